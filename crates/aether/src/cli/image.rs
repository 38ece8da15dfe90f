//! `aether image`: the images of this machine; no server is asked.

use std::path::PathBuf;

use aether_images::{BuildRequest, Image as Stored, ImageStore};

use super::{progress::Progress, table};
use crate::{
    args::{Global, Image, ImageArgs, ImageBuild},
    exit::Exit,
    failure::Failure,
    output,
};

pub(crate) fn run(global: &Global, args: ImageArgs) -> Result<Exit, Failure> {
    let store = ImageStore::open(args.images.path())?;
    match args.command {
        Image::List => list(global, &store.list()?),
        Image::Inspect { name } => inspect(global, &store, &name)?,
        Image::Build(build_args) => build(global, &store, build_args)?,
    }
    Ok(Exit::Success)
}

fn list(global: &Global, images: &[Stored]) {
    if global.json {
        output::json(&images.iter().map(document).collect::<Vec<_>>());
    } else if images.is_empty() {
        output::note("there are no images; `aether image build` makes one");
    } else {
        let row = |image: &Stored| {
            vec![
                image.name.clone(),
                short(&image.digest),
                image.suite.clone(),
                image.kernel.version.clone(),
                table::size(size(image)),
                image.created_at.strftime("%Y-%m-%d %H:%M").to_string(),
            ]
        };
        table::print(
            &["NAME", "DIGEST", "SUITE", "KERNEL", "SIZE", "CREATED (UTC)"],
            images.iter().map(row).collect(),
        );
    }
}

fn inspect(global: &Global, store: &ImageStore, name: &str) -> Result<(), Failure> {
    let image = store.get(name)?;
    // Reads every file and compares its digest.
    store.resolve(name)?;
    if global.json {
        output::json(&document(&image));
        return Ok(());
    }
    let line = |name: &str, value: String| output::line(&format!("{name:<10} {value}"));
    line("name", image.name.clone());
    line("digest", image.digest.to_string());
    line("created", image.created_at.to_string());
    line("suite", image.suite.clone());
    let kernel = &image.kernel;
    line("kernel", format!("{} {}", kernel.version, blob(&kernel.blob)));
    line("initrd", blob(&image.initrd));
    line("rootfs", blob(&image.rootfs));
    line("agent", image.guest_agent.to_string());
    line("packages", format!("{}; --json lists them", image.packages.len()));
    line("checked", "every file is what its digest says".to_owned());
    Ok(())
}

fn build(global: &Global, store: &ImageStore, args: ImageBuild) -> Result<(), Failure> {
    let agent = match args.agent {
        Some(agent) => agent,
        None => agent_beside_us()?,
    };
    let request = BuildRequest {
        test_kernel: args.test_kernel,
        suite: args.suite,
        packages: args.packages,
        refresh: args.refresh,
        ..BuildRequest::new(agent)
    };
    let spinner = Progress::spinner("building", global.json);
    let watched = output::is_watched();
    let image = store.build(&request, &|step| {
        if watched {
            spinner.say(step);
        } else {
            output::note(step);
        }
    })?;
    drop(spinner);
    if global.json {
        output::json(&document(&image));
    } else {
        output::line(&format!("{} is {}", image.name, image.digest));
    }
    Ok(())
}

fn agent_beside_us() -> Result<PathBuf, Failure> {
    let us = std::env::current_exe().map_err(|e| Failure::io("find this program", &e))?;
    let agent = us.with_file_name("aether-agent");
    if agent.is_file() {
        return Ok(agent);
    }
    Err(Failure::usage(format!("there is no agent at {}", agent.display()))
        .hint("build it with `./dev build`, and give it with --agent"))
}

/// The manifest with its digest, which the manifest itself cannot have.
fn document(image: &Stored) -> serde_json::Value {
    let mut value = serde_json::to_value(image).unwrap_or_default();
    value["digest"] = image.digest.to_string().into();
    value
}

fn size(image: &Stored) -> u64 {
    image.kernel.blob.size_bytes + image.initrd.size_bytes + image.rootfs.size_bytes
}

fn blob(blob: &aether_images::Blob) -> String {
    format!("{} {}", blob.digest, table::size(blob.size_bytes))
}

fn short(digest: &aether_images::Digest) -> String {
    digest.hex().chars().take(12).collect()
}
