//! How `selvedge demo kill NAME` reaches the demo that runs: one line each way over a socket in its directory.

use std::path::Path;

use anyhow::{Context as _, bail};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

/// Longest request.
const REQUEST_BYTES_MAX: u64 = 1_024;
/// Requests that wait for the demo.
const WAITING_MAX: usize = 16;

/// What to break or mend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `kill`, `stop`, `cont`, `partition`, `heal` or `status`.
    pub action: String,
    /// A process, a region, or nothing.
    pub name: String,
}

/// A request with the way back to who asked.
pub struct Asked {
    pub request: Request,
    pub answer: oneshot::Sender<anyhow::Result<String>>,
}

/// Takes requests at `path`.
pub fn listen(path: &Path) -> anyhow::Result<mpsc::Receiver<Asked>> {
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at `{}`", path.display()))?;
    let (send, receive) = mpsc::channel(WAITING_MAX);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let send = send.clone();
            // Whoever asks and goes away misses its own answer only.
            tokio::spawn(async move { drop(serve(socket, send).await) });
        }
    });
    Ok(receive)
}

/// Asks the demo at `path`.
pub async fn ask(path: &Path, request: &Request) -> anyhow::Result<String> {
    let mut socket = UnixStream::connect(path).await.context("the demo does not answer")?;
    socket.write_all(format!("{} {}\n", request.action, request.name).as_bytes()).await?;
    let mut text = String::new();
    socket.read_to_string(&mut text).await?;
    match text.split_once('\n') {
        Some(("done", answer)) => Ok(answer.to_owned()),
        Some(("failed", answer)) => bail!("{}", answer.trim_end()),
        _ => bail!("the demo ended before it answered"),
    }
}

async fn serve(socket: UnixStream, send: mpsc::Sender<Asked>) -> anyhow::Result<()> {
    let (read, mut write) = socket.into_split();
    let mut line = String::new();
    BufReader::new(read).take(REQUEST_BYTES_MAX).read_line(&mut line).await?;
    let (action, name) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
    let (answer, answered) = oneshot::channel();
    let request = Request { action: action.to_owned(), name: name.to_owned() };
    send.send(Asked { request, answer }).await?;
    let text = match answered.await? {
        Ok(text) => format!("done\n{text}"),
        Err(error) => format!("failed\n{error:#}"),
    };
    write.write_all(text.as_bytes()).await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_is_answered_and_a_failure_is_one_for_who_asked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.sock");
        let mut requests = listen(&path).unwrap();
        tokio::spawn(async move {
            while let Some(asked) = requests.recv().await {
                let answer = match asked.request.name.as_str() {
                    "virginia" => Ok(format!("{}\nsecond line\n", asked.request.action)),
                    name => Err(anyhow::anyhow!("there is no `{name}`")),
                };
                let _ = asked.answer.send(answer);
            }
        });
        let kill = |name: &str| Request { action: "kill".into(), name: name.into() };
        assert_eq!(ask(&path, &kill("virginia")).await.unwrap(), "kill\nsecond line\n");
        assert_eq!(ask(&path, &kill("rome")).await.unwrap_err().to_string(), "there is no `rome`");
    }
}
