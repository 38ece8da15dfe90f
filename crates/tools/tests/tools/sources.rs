//! What sources deliver becomes the builder's artefacts.

use crate::fake::{Rig, sha256};

#[tokio::test]
async fn wheel_of_an_index_is_taken() {
    let rig = Rig::new().await;
    rig.put_recipe("snake", "[source]\nkind = \"pypi\"\npackage = \"Snake_Tool\"");
    let hex = "da65cbbf8cd1a5ea4aba05bdb17c7a8c3c3a6e3bd6e2ea8a0e5b1fd7b5aa1b2c";
    let file = |name: &str, hex: &str| {
        format!(
            r#"{{"filename":"{name}","url":"../../f/{name}","hashes":{{"sha256":"{hex}"}},"size":5}}"#
        )
    };
    let good = sha256(b"wheel");
    let files = [
        file("snake_tool-1.0-py3-none-manylinux2014_x86_64.whl", &good),
        file("snake_tool-1.0-py3-none-musllinux_1_2_x86_64.whl", hex),
        file("snake_tool-2.0-py3-none-macosx_11_0_arm64.whl", hex),
    ];
    rig.registry.put(
        "/simple/snake-tool/",
        "application/vnd.pypi.simple.v1+json",
        format!(r#"{{"files":[{}]}}"#, files.join(",")),
    );
    rig.registry.put("/f/snake_tool-1.0-py3-none-manylinux2014_x86_64.whl", "", "wheel");
    let layer = rig.ensure(&rig.tools(), "snake").await.unwrap();
    assert_eq!(layer.got, "1.0");
    let content = std::fs::read(layer.path).unwrap();
    assert!(content[2048..].starts_with(b"wheel"));
}

#[tokio::test]
async fn archive_is_taken_with_the_digest_of_its_checksum_file() {
    let rig = Rig::new().await;
    let url = &rig.registry.url;
    rig.put_recipe(
        "box",
        &format!(
            "[source]\nkind = \"archive\"\nurl = \"{url}/box-{{version}}.tar.gz\"\n\
             checksums = \"{url}/{{version}}/SHA256SUMS\"\n\
             index = {{ url = \"{url}/list\", after = \"box-\", before = \".tar\" }}\n"
        ),
    );
    rig.registry.put("/list", "text/html", "box-1.0.tar.gz box-1.2.tar.gz box-old.tar.gz");
    rig.registry.put("/box-1.2.tar.gz", "", "archive");
    let digest = sha256(b"archive");
    rig.registry.put("/1.2/SHA256SUMS", "", format!("{digest}  box-1.2.tar.gz\n"));
    let tools = rig.tools();
    assert_eq!(rig.ensure(&tools, "box").await.unwrap().got, "1.2");
    let error = rig.ensure(&tools, "box@1.0").await.unwrap_err().to_string();
    assert!(error.contains("SHA256SUMS"), "{error}");
}

#[tokio::test]
async fn platform_package_has_the_versions_of_its_tool() {
    let rig = Rig::new().await;
    rig.put_recipe(
        "parts",
        "[source]\nkind = \"npm\"\npackage = \"@parts/linux\"\nversions_of = \"parts\"\n\
         [[extra]]\nnpm = \"helper\"\nversion = \"*\"\nengine = \"x\"\n",
    );
    rig.registry.put_npm("parts", &[("3.0.0", b""), ("2.0.0", b""), ("1.0.0", b"")]);
    rig.registry.put_npm("@parts/linux", &[("2.0.0", b"linux"), ("1.0.0", b"old")]);
    // Each fits tools from its own version on.
    rig.registry.put_npm("helper", &[("2.5.0", b"new"), ("1.5.0", b"fits")]);
    let tools = rig.tools();
    let layer = rig.ensure(&tools, "parts").await.unwrap();
    assert_eq!(layer.got, "2.0.0", "3.0.0 is not there for the platform");
    let content = std::fs::read(layer.path).unwrap();
    assert!(content[2048..].starts_with(b"linuxfits"));
    assert!(rig.ensure(&tools, "parts@3").await.unwrap_err().to_string().contains("2.0.0"));
}

#[tokio::test]
async fn package_that_is_not_there_is_named() {
    let rig = Rig::new().await;
    rig.put_recipe("gone", "[source]\nkind = \"npm\"\npackage = \"gone\"");
    let error = rig.ensure(&rig.tools(), "gone").await.unwrap_err().to_string();
    assert!(error.contains("no package gone"), "{error}");
}
