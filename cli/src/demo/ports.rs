//! Ports: the usual ones, or others where those are taken.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::TcpListener;

/// Hands out ports on loopback, each once.
#[derive(Default)]
pub struct Ports {
    replaced: Vec<(u16, u16)>,
}

impl Ports {
    /// A listener on the usual port, or on another one.
    pub async fn listen(&mut self, usual: u16) -> std::io::Result<TcpListener> {
        match TcpListener::bind(at(usual)).await {
            Ok(listener) => Ok(listener),
            Err(_) => {
                let listener = TcpListener::bind(at(0)).await?;
                self.replaced.push((usual, listener.local_addr()?.port()));
                Ok(listener)
            }
        }
    }

    /// An address for a process that will listen itself.
    pub async fn reserve(&mut self, usual: u16) -> std::io::Result<SocketAddr> {
        self.listen(usual).await?.local_addr()
    }

    /// (usual, instead) of those that were taken.
    pub fn replaced(&self) -> &[(u16, u16)] {
        &self.replaced
    }
}

fn at(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}
