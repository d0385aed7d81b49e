//! Who reaches what.

use anyhow::{bail, ensure};
use sha2::{Digest as _, Sha256};

use super::super::apps;
use super::super::clock::Moment;
use super::super::world::BILLING;
use super::{Tour, fetch};

const BULK_BYTES: u64 = 64 << 20;
/// As long as the name of `crm`, so that what is printed has the same length.
const NOWHERE: &str = "nix.internal";

impl Tour {
    pub(super) async fn bulk(&mut self) -> anyhow::Result<String> {
        let listener = self.listener("allowed-frankfurt", apps::CRM).await?;
        let begun = Moment::now();
        let (head, body) = fetch(listener, &format!("/blob?bytes={BULK_BYTES}")).await?;
        let took_ms = Moment::now().ms_since(begun);
        ensure!(body.len() as u64 == BULK_BYTES, "{} bytes came", body.len());
        let got = hex::encode(Sha256::digest(&body));
        let sent = apps::blob_sha256(BULK_BYTES);
        ensure!(got == sent && head.contains(&sent), "SHA-256 is {got} and was {sent}");
        let mib_s = BULK_BYTES as f64 / f64::from(1 << 20) / (took_ms / 1_000.0);
        Ok(format!("SHA-256 {}.. on both ends, {took_ms:.0} ms, {mib_s:.0} MiB/s", &sent[..12]))
    }

    pub(super) async fn denied(&mut self) -> anyhow::Result<String> {
        // Both from a client that runs already, and each a second time, so that nothing differs but the name.
        let (crm, nowhere) = (apps::CRM, (NOWHERE, apps::CRM.1));
        for _ in 0..2 {
            let denied = self.nc("denied", crm, b"GET / HTTP/1.1\r\n\r\n").await?;
            let unknown = self.nc("denied", nowhere, b"GET / HTTP/1.1\r\n\r\n").await?;
            ensure!(denied.code == Some(1), "exit code {:?}: {}", denied.code, denied.err.trim_end());
            ensure!(denied.out.is_empty(), "the denied got {} bytes", denied.out.len());
            let mut as_unknown = denied.clone();
            as_unknown.err = denied.err.replace(crm.0, nowhere.0);
            ensure!(as_unknown == unknown, "denied: {denied:?}, a name that does not exist: {unknown:?}");
        }
        let said = self.nc("denied", crm, b"").await?;
        Ok(format!("both say `{}` and exit 1", said.err.trim_end()))
    }

    pub(super) async fn workload(&mut self) -> anyhow::Result<String> {
        let begun = Moment::now();
        let balance = self.nc(BILLING, apps::LEDGER, b"balance\n").await?;
        let took_ms = Moment::now().ms_since(begun);
        ensure!(balance.text().starts_with("balance 1204.50"), "{:?} {}", balance.text(), balance.err.trim_end());
        for target in [apps::CRM, apps::CHAT, ("ledger.internal", 9_001)] {
            let ran = self.nc(BILLING, target, b"").await?;
            if ran.code != Some(1) || !ran.out.is_empty() {
                bail!("{}:{} answers a workload that may not: {ran:?}", target.0, target.1);
            }
        }
        let person = self.nc("allowed-frankfurt", apps::LEDGER, b"balance\n").await?;
        ensure!(person.code == Some(1) && person.out.is_empty(), "a person reaches the ledger: {person:?}");
        Ok(format!(
            "ledger answers from virginia to singapore in {took_ms:.0} ms, a client started for it; crm, chat and another port do not"
        ))
    }

    pub(super) async fn interactive(&mut self) -> anyhow::Result<String> {
        use anyhow::Context as _;
        use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
        const LINES: u32 = 50;
        let listener = self.listener("allowed-singapore", apps::CHAT).await?;
        let mut socket = tokio::net::TcpStream::connect(listener).await?;
        socket.set_nodelay(true)?;
        let (read, mut write) = socket.split();
        let mut lines = BufReader::new(read).lines();
        lines.next_line().await?.context("no greeting")?;
        let mut times_ms = Vec::new();
        for number in 0..LINES {
            let sent = Moment::now();
            write.write_all(format!("line {number} of a talk\n").as_bytes()).await?;
            let answer = lines.next_line().await?.context("the session ended")?;
            ensure!(answer == format!("LINE {number} OF A TALK"), "`{answer}` is not the answer to line {number}");
            times_ms.push(Moment::now().ms_since(sent));
        }
        write.shutdown().await?;
        ensure!(lines.next_line().await?.is_none(), "the end did not pass through");
        times_ms.sort_by(f64::total_cmp);
        Ok(format!(
            "{LINES} lines from singapore, median {:.1} ms there and back, slowest {:.1} ms",
            times_ms[times_ms.len() / 2],
            times_ms[times_ms.len() - 1]
        ))
    }
}
