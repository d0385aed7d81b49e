//! The servers that are fetched from: bytes as many as asked, and an echo.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

/// Sends as many bytes as the first eight say.
pub struct Source {
    pub address: SocketAddr,
}

impl Source {
    pub fn start() -> std::io::Result<Self> {
        Ok(Self { address: serve(send)? })
    }
}

/// Sends back what it gets.
pub struct Echo {
    pub address: SocketAddr,
}

impl Echo {
    pub fn start() -> std::io::Result<Self> {
        Ok(Self { address: serve(echo)? })
    }
}

fn serve(answer: fn(TcpStream) -> std::io::Result<()>) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || answer(stream));
        }
    });
    Ok(address)
}

fn send(mut stream: TcpStream) -> std::io::Result<()> {
    let mut wanted = [0; 8];
    stream.read_exact(&mut wanted)?;
    let chunk = vec![0x5e; 256 << 10];
    let mut left = u64::from_be_bytes(wanted);
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
        stream.write_all(&chunk[..now])?;
        left -= now as u64;
    }
    Ok(())
}

fn echo(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return Ok(());
        }
        stream.write_all(&buffer[..read])?;
    }
}
