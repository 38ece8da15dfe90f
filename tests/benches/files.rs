//! 256 MiB each way through the API against a raw copy over the same channel, by turns.

use std::{
    io::{Read as _, Write as _},
    time::{Duration, Instant},
};

use aether_api::client::{ReadOptions, WriteOptions};
use aether_tests::{
    Platform, Setup,
    measure::{Comparison, samples},
    platform, wire,
};
use anyhow::{Result, ensure};
use bytes::Bytes;

const BYTES: usize = 256 * 1024 * 1024;
const CHUNK: usize = 64 * 1024;
const PATH: &str = "/dev/shm/file";

#[tokio::main]
async fn main() -> Result<()> {
    let platform = Platform::start(Setup::qemu())?;
    // The file is in memory on both sides: the channel is what is measured.
    let mut request = platform::small_vm("files");
    request.memory_mb = Some(1024);
    let vm = platform.create(&request).await?.id.to_string();
    platform.run_bare_agent(&vm).await?;
    let lane = wire::Lane::open(&platform.namespace()?)?;
    platform.execute(&vm, &["mount", "-o", "remount,size=600m", "/dev/shm"]).await?;

    // The bar is on the rate: at least 0.9 of the raw copy's.
    let bar = 1.0 / 0.9;
    let mut up = Comparison::new("files to the guest", bar);
    let mut down = Comparison::new("files from the guest", bar);
    for _ in 0..samples(5) {
        up.ours.push(upload(&platform, &vm).await?);
        up.bare.push(bare_upload(&lane)?);
        down.ours.push(download(&platform, &vm).await?);
        down.bare.push(bare_download(&lane)?);
    }
    platform.delete(&vm).await?;
    platform.finish()?;
    let (up, down) = (up.report(), down.report());
    up.and(down)
}

async fn upload(platform: &Platform, vm: &str) -> Result<Duration> {
    let chunk = Bytes::from(vec![7; CHUNK]);
    let chunks = (0..BYTES / CHUNK).map(move |_| Ok::<_, std::io::Error>(chunk.clone()));
    let start = Instant::now();
    let body = futures::stream::iter(chunks);
    platform.client().write_file(vm, PATH, &WriteOptions::default(), body).await?;
    Ok(start.elapsed())
}

async fn download(platform: &Platform, vm: &str) -> Result<Duration> {
    let start = Instant::now();
    let mut file = platform.client().read_file(vm, PATH, &ReadOptions::default()).await?;
    let mut bytes = 0;
    while let Some(chunk) = file.next_chunk().await? {
        bytes += chunk.len();
    }
    let took = start.elapsed();
    ensure!(bytes == BYTES, "{bytes} bytes came");
    Ok(took)
}

fn bare_upload(lane: &wire::Lane) -> Result<Duration> {
    let chunk = vec![7; CHUNK];
    let start = Instant::now();
    let mut stream = lane.dial(platform::BARE_PORT)?;
    stream.write_all(format!("w\t{PATH}\t{BYTES}\n").as_bytes())?;
    for _ in 0..BYTES / CHUNK {
        stream.write_all(&chunk)?;
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    ensure!(answer == "ok", "{answer:?}");
    Ok(start.elapsed())
}

fn bare_download(lane: &wire::Lane) -> Result<Duration> {
    let mut buffer = vec![0; CHUNK];
    let start = Instant::now();
    let mut stream = lane.dial(platform::BARE_PORT)?;
    stream.write_all(format!("r\t{PATH}\n").as_bytes())?;
    let mut bytes = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            count => bytes += count,
        }
    }
    ensure!(bytes == BYTES, "{bytes} bytes came");
    Ok(start.elapsed())
}
