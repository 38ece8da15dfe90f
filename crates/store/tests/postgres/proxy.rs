//! Between a client and the server: passes everything on, and cuts a connection as it commits.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use aether_postgres::{Config, Parts, Place, TlsMode, testing::TestDatabase};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UnixStream},
};

/// What happens to the next commit, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Cut {
    Nothing,
    /// The server never hears of it.
    Before,
    /// The server has done it, the client never hears of that.
    After,
    /// As `After`, and from then on nobody gets through.
    AfterAndClosed,
    Closed,
}

impl Cut {
    fn from(number: u8) -> Self {
        [Self::Nothing, Self::Before, Self::After, Self::AfterAndClosed, Self::Closed]
            .into_iter()
            .find(|cut| *cut as u8 == number)
            .unwrap()
    }
}

#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) config: Config,
    cut: Arc<AtomicU8>,
}

impl Proxy {
    pub(crate) async fn before(test: &TestDatabase, database: &str) -> Self {
        let Place::Socket { folder, port } = test.config.place() else { panic!("not a socket") };
        let server = folder.join(format!(".s.PGSQL.{port}"));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let parts = Parts {
            host: Some("127.0.0.1".to_owned()),
            port: Some(listener.local_addr().unwrap().port()),
            user: Some("postgres".to_owned()),
            database: Some(database.to_owned()),
            ..Parts::default()
        };
        let config = Config::from_parts(parts).unwrap();
        let config = config.tls(Some(TlsMode::Disable), None).unwrap();
        let cut = Arc::new(AtomicU8::new(Cut::Nothing as u8));
        let shared = Arc::clone(&cut);
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                if Cut::from(shared.load(Ordering::SeqCst)) != Cut::Closed {
                    tokio::spawn(pass(client, server.clone(), Arc::clone(&shared)));
                }
            }
        });
        Self { config, cut }
    }

    pub(crate) fn set(&self, cut: Cut) {
        self.cut.store(cut as u8, Ordering::SeqCst);
    }

    /// Whether it has cut what it was to cut.
    pub(crate) fn has_cut(&self) -> bool {
        matches!(Cut::from(self.cut.load(Ordering::SeqCst)), Cut::Nothing | Cut::Closed)
    }
}

/// Until one end goes, or it is cut: both ends are then dropped.
async fn pass(mut client: TcpStream, server: PathBuf, cut: Arc<AtomicU8>) {
    let mut server = UnixStream::connect(server).await.unwrap();
    let (mut asked, mut answered) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            count = client.read(&mut asked) => {
                let Ok(count @ 1..) = count else { return };
                let asked = &asked[..count];
                let commits = asked.windows(7).any(|bytes| bytes == b"COMMIT\0");
                let after = Cut::from(cut.load(Ordering::SeqCst));
                if after == Cut::Closed {
                    return;
                }
                if commits && after == Cut::Before {
                    cut.store(Cut::Nothing as u8, Ordering::SeqCst);
                    return;
                }
                if server.write_all(asked).await.is_err() {
                    return;
                }
                if commits && matches!(after, Cut::After | Cut::AfterAndClosed) {
                    // It has answered, so it is done.
                    let _ = server.read(&mut answered).await;
                    let closed = after == Cut::AfterAndClosed;
                    let next = if closed { Cut::Closed } else { Cut::Nothing };
                    cut.store(next as u8, Ordering::SeqCst);
                    return;
                }
            }
            count = server.read(&mut answered) => {
                let Ok(count @ 1..) = count else { return };
                if client.write_all(&answered[..count]).await.is_err() {
                    return;
                }
            }
        }
    }
}
