//! A registry of the test's own, a builder that does as it is told, and tools that use them.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use aether_tools::{
    BaseImage, BuildError, BuildJob, Builder, LogSink, ReadyLayer, ToolError, ToolEvent, Tools,
    ToolsConfig,
};
use async_trait::async_trait;
use axum::Router;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use sha2::Digest;
use tempfile::TempDir;
use tokio::sync::Notify;

/// Serves what it was given, by path.
#[derive(Debug, Clone)]
pub(crate) struct Registry {
    pub(crate) url: String,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    files: Mutex<HashMap<String, (&'static str, Vec<u8>)>>,
    is_down: AtomicBool,
    requests: AtomicUsize,
}

impl Registry {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let state = Arc::new(State::default());
        let serving = Arc::clone(&state);
        let router = Router::new().fallback(move |request: Request| {
            let answer = serving.answer(request.uri().path());
            async move { answer }
        });
        // Ends with the test's runtime.
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { url, state }
    }

    pub(crate) fn put(&self, path: &str, kind: &'static str, content: impl Into<Vec<u8>>) {
        self.state.files.lock().unwrap().insert(path.to_owned(), (kind, content.into()));
    }

    /// A package of npm: versions, the first one of which is the latest, each with its content.
    pub(crate) fn put_npm(&self, package: &str, versions: &[(&str, &[u8])]) {
        let mut listing = String::new();
        for (version, content) in versions {
            let digest =
                base64::engine::general_purpose::STANDARD.encode(sha2::Sha512::digest(content));
            let url = format!("{}/elsewhere/{package}-{version}.tgz", self.url);
            let comma = if listing.is_empty() { "" } else { "," };
            write!(
                listing,
                r#"{comma}"{version}":{{"engines":{{"x":">={version}"}},"dist":{{"integrity":"sha512-{digest}","tarball":"{url}"}}}}"#
            )
            .unwrap();
            let plain = package.rsplit('/').next().unwrap();
            self.put(&format!("/{package}/-/{plain}-{version}.tgz"), "", *content);
        }
        let latest = versions[0].0;
        let listing =
            format!(r#"{{"dist-tags":{{"latest":"{latest}"}},"versions":{{{listing}}}}}"#);
        let path = format!("/{}", package.replace('/', "%2f"));
        self.put(&path, "application/json", listing);
    }

    pub(crate) fn set_down(&self, is_down: bool) {
        self.state.is_down.store(is_down, Ordering::SeqCst);
    }

    pub(crate) fn requests(&self) -> usize {
        self.state.requests.load(Ordering::SeqCst)
    }
}

impl State {
    fn answer(&self, path: &str) -> Response {
        self.requests.fetch_add(1, Ordering::SeqCst);
        if self.is_down.load(Ordering::SeqCst) {
            return StatusCode::FORBIDDEN.into_response();
        }
        match self.files.lock().unwrap().get(path) {
            Some((kind, content)) => {
                ([(header::CONTENT_TYPE, *kind)], content.clone()).into_response()
            }
            None => StatusCode::NOT_FOUND.into_response(),
        }
    }
}

/// What a builder does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Does {
    Build,
    Fail(i32),
    Hang,
    FillTheDisk,
    Garbage,
    Panic,
    /// Waits for [`FakeBuilder::go_on`].
    Wait,
}

#[derive(Debug)]
pub(crate) struct FakeBuilder {
    does: Mutex<Does>,
    builds: AtomicUsize,
    begun: Notify,
    go_on: Notify,
}

impl FakeBuilder {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            does: Mutex::new(Does::Build),
            builds: AtomicUsize::new(0),
            begun: Notify::new(),
            go_on: Notify::new(),
        })
    }

    pub(crate) fn set(&self, does: Does) {
        *self.does.lock().unwrap() = does;
    }

    pub(crate) fn builds(&self) -> usize {
        self.builds.load(Ordering::SeqCst)
    }

    /// Waits until a build has begun.
    pub(crate) async fn begun(&self) {
        self.begun.notified().await;
    }

    pub(crate) fn go_on(&self) {
        self.go_on.notify_one();
    }
}

#[async_trait]
impl Builder for FakeBuilder {
    async fn build(&self, job: BuildJob, log: LogSink) -> Result<(), BuildError> {
        self.builds.fetch_add(1, Ordering::SeqCst);
        log.write(b"::stage install\nunpacking\nalmost ");
        log.write(b"done\n");
        // Whatever it does, it has begun to write.
        std::fs::write(&job.output, vec![0; 100]).unwrap();
        self.begun.notify_one();
        let does = *self.does.lock().unwrap();
        match does {
            Does::Build => {}
            Does::Fail(status) => return Err(BuildError::Script { status }),
            Does::Hang => std::future::pending().await,
            Does::FillTheDisk => return Err(BuildError::NoSpace { place: "the builder".into() }),
            Does::Garbage => {
                std::fs::write(&job.output, vec![7; 8192]).unwrap();
                return Ok(());
            }
            Does::Panic => panic!("as it was told"),
            Does::Wait => self.go_on.notified().await,
        }
        let artefacts = job.artefacts.iter().map(|artefact| std::fs::read(&artefact.path).unwrap());
        let content: Vec<u8> = artefacts.flatten().collect();
        log.write(b"::size 8192\n");
        std::fs::write(&job.output, image(&content)).unwrap();
        Ok(())
    }
}

/// What passes for an image, with something behind its end.
fn image(content: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 12288];
    image[1024..1028].copy_from_slice(&[0xe2, 0xe1, 0xf5, 0xe0]);
    image[2048..2048 + content.len()].copy_from_slice(content);
    image
}

pub(crate) fn base() -> BaseImage {
    BaseImage {
        image: "debian".to_owned(),
        digest: format!("blake3:{}", "0".repeat(64)),
        suite: "bookworm".to_owned(),
        packages: vec!["libc6=2.36".to_owned()],
    }
}

/// A folder, a registry, a builder, and recipes for `hello` and `world`.
pub(crate) struct Rig {
    pub(crate) folder: TempDir,
    pub(crate) registry: Registry,
    pub(crate) builder: Arc<FakeBuilder>,
}

const RECIPE: &str = r#"
name = "NAME"
summary = "Says it"
commands = ["NAME"]
install = "true"
verify = "NAME"
expect = ["{version}"]
"#;

impl Rig {
    pub(crate) async fn new() -> Self {
        let rig = Self {
            folder: tempfile::tempdir().unwrap(),
            registry: Registry::start().await,
            builder: FakeBuilder::new(),
        };
        std::fs::create_dir(rig.path("recipes")).unwrap();
        rig.put_recipe("hello", "[source]\nkind = \"npm\"\npackage = \"hello\"");
        rig.put_recipe("world", "[source]\nkind = \"npm\"\npackage = \"@my/world\"");
        rig.registry.put_npm("hello", &[("1.2.0", b"1.2.0"), ("1.1.0", b"1.1.0")]);
        rig.registry.put_npm("@my/world", &[("3.0.0", b"3.0.0")]);
        rig
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn put_recipe(&self, name: &str, rest: &str) {
        let path = self.path("recipes").join(format!("{name}.toml"));
        std::fs::write(path, RECIPE.replace("NAME", name) + rest).unwrap();
    }

    pub(crate) fn config(&self) -> ToolsConfig {
        let mut config = ToolsConfig::new(self.path("tools"));
        config.catalogue = Some(self.path("recipes"));
        config.endpoints.npm = Some(self.registry.url.clone());
        config.endpoints.pypi = Some(format!("{}/simple", self.registry.url));
        config
    }

    pub(crate) fn tools(&self) -> Tools {
        Tools::open(self.config()).unwrap()
    }

    pub(crate) fn builder(&self) -> Arc<dyn Builder> {
        Arc::<FakeBuilder>::clone(&self.builder)
    }

    pub(crate) async fn ensure(&self, tools: &Tools, asked: &str) -> Result<ReadyLayer, ToolError> {
        self.ensure_telling(tools, asked, &|_| ()).await
    }

    pub(crate) async fn ensure_telling(
        &self,
        tools: &Tools,
        asked: &str,
        progress: &(dyn Fn(ToolEvent) + Send + Sync),
    ) -> Result<ReadyLayer, ToolError> {
        let request = asked.parse().unwrap();
        let layers = tools.ensure(&[request], &base(), &self.builder(), progress).await?;
        Ok(layers.into_iter().next().unwrap())
    }

    /// The files under a folder of the store.
    pub(crate) fn files(&self, folder: &str) -> usize {
        count(&self.path("tools").join(folder))
    }

    /// Nothing in hand is left, and nothing that is half made.
    pub(crate) fn assert_only(&self, layers: usize) {
        assert_eq!((self.files("layers"), self.files("records")), (layers, layers));
        // The session's own lock.
        assert_eq!(self.files("tmp"), 1, "something is left under tmp");
    }

    /// The same, when the tools have been closed.
    pub(crate) fn assert_only_after(&self, layers: usize) {
        assert_eq!((self.files("layers"), self.files("records")), (layers, layers));
        assert_eq!(self.files("tmp"), 0, "something is left under tmp");
    }
}

fn count(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .map(|entry| {
            let path = entry.unwrap().path();
            if path.is_dir() { count(&path) } else { 1 }
        })
        .sum()
}

pub(crate) fn sha256(content: &[u8]) -> String {
    let digest = sha2::Sha256::digest(content);
    digest.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap();
        hex
    })
}
