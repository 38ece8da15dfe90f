//! A TCP proxy with faults: between a platform and what it needs.

use std::{net::SocketAddr, time::Duration};

use anyhow::Result;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

/// What the way does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Open,
    /// Every piece arrives later by so much.
    Slow(Duration),
    /// What is sent arrives, and no answer comes back.
    OneWay,
    /// Nothing arrives, and no end says so.
    Silent,
    /// All connections end, and none is taken.
    Cut,
}

/// It ends with its value.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    way: watch::Sender<Way>,
    accepts: JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn to(server: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let way = watch::Sender::new(Way::Open);
        let told = way.subscribe();
        let accepts = tokio::spawn(async move {
            loop {
                let Ok((client, _)) = listener.accept().await else { continue };
                if *told.borrow() != Way::Cut {
                    tokio::spawn(pass(client, server, told.clone()));
                }
            }
        });
        Ok(Self { address, way, accepts })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn set(&self, way: Way) {
        self.way.send_replace(way);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.way.send_replace(Way::Cut);
        self.accepts.abort();
    }
}

/// Until one end goes, or the way is cut.
async fn pass(client: TcpStream, server: SocketAddr, way: watch::Receiver<Way>) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let mut is_cut = way.clone();
    tokio::select! {
        () = carry(from_client, to_server, way.clone(), false) => {}
        () = carry(from_server, to_client, way, true) => {}
        // The proxy is gone where the sender is.
        _ = is_cut.wait_for(|way| *way == Way::Cut) => {}
    }
}

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut way: watch::Receiver<Way>,
    is_answer: bool,
) {
    let mut buffer = vec![0; 1 << 14];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let holds = |way: &Way| *way == Way::Silent || *way == Way::OneWay && is_answer;
        if way.wait_for(|way| !holds(way)).await.is_err() {
            return;
        }
        let now = *way.borrow();
        if let Way::Slow(time) = now {
            tokio::time::sleep(time).await;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
