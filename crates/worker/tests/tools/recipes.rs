//! A source of tools of our own: a catalogue, and a server with its artefacts.

use std::{fmt::Write as _, net::SocketAddr, path::Path, process::Command};

use aether_tools::{Tools, ToolsConfig};
use aether_types::ToolRequest;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_util::task::AbortOnDropHandle;

/// Serves one text for every path, until it is dropped.
pub(crate) struct Source {
    address: SocketAddr,
    _serving: AbortOnDropHandle<()>,
}

const ARTEFACT: &str = "an artefact\n";

impl Source {
    pub(crate) async fn open() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).await;
                let length = ARTEFACT.len();
                let answer = format!(
                    "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{ARTEFACT}"
                );
                let _ = stream.write_all(answer.as_bytes()).await;
            }
        });
        Self { address, _serving: AbortOnDropHandle::new(serving) }
    }

    /// Adds a tool with versions 1.0.0 and 2.0.0 to a catalogue.
    pub(crate) fn recipe(&self, folder: &Path, name: &str, install: &str) {
        let sum = Command::new("sh")
            .args(["-c", &format!("printf '%s' '{ARTEFACT}' | sha256sum | cut -d' ' -f1")])
            .output()
            .unwrap();
        let digest = String::from_utf8(sum.stdout).unwrap().trim().to_owned();
        let mut text = format!(
            "name = \"{name}\"\nsummary = \"says its version\"\ncommands = [\"{name}\"]\n\
             install = '''\n{install}\n'''\nverify = \"{name}\"\n\
             expect = [\"{name} {{version}}\"]\nroom_mb = 64\n\
             [source]\nkind = \"archive\"\nurl = \"http://{}/{name}-{{version}}.txt\"\n",
            self.address
        );
        for version in ["1.0.0", "2.0.0"] {
            let _ = write!(
                text,
                "[[source.releases]]\nversion = \"{version}\"\ndigest = \"sha256:{digest}\"\n"
            );
        }
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join(format!("{name}.toml")), text).unwrap();
    }

    /// Tools of the catalogue in this folder.
    pub(crate) fn tools(folder: &Path) -> Tools {
        let config = ToolsConfig {
            catalogue: Some(folder.join("catalogue")),
            ..ToolsConfig::new(folder.join("tools"))
        };
        Tools::open(config).unwrap()
    }
}

/// Installs a command that says the tool's name, its version and the artefact.
pub(crate) const SAYS_ITSELF: &str = r#"
mkdir -p "$TREE"
cp "$ARTEFACTS"/* "$TREE/artefact"
printf '#!/bin/sh\necho %s %s\ncat /usr/lib/tools/%s-%s/artefact\n' "$TOOL" "$VERSION" "$TOOL" "$VERSION" > "$TREE/$TOOL"
chmod 755 "$TREE/$TOOL"
put_command "$TREE/$TOOL"
"#;

pub(crate) fn asked(texts: &[&str]) -> Vec<ToolRequest> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}
