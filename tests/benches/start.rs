//! From the request for a VM to the first byte of its first command, at the client: a boot, a
//! restore and a claim from a pool, against a bare QEMU (or Firecracker) driven as a script would,
//! with the same kernel, image, memory and devices, by turns.

use std::time::Duration;

use aether_api::{BuildTemplate, CreateVm};
use aether_tests::{
    Platform, Setup,
    bare::Bare,
    bare_firecracker::BareFirecracker,
    floor::Floor,
    measure::{Comparison, Times, has_flag, samples},
};
use aether_types::StartKind;
use anyhow::{Context, Result, ensure};
use serde_json::json;

const MEMORY_MB: u32 = 256;
const COMMAND: &[&str] = &["/bin/sh", "-c", "echo ready"];
/// A template without a pool.
const TEMPLATE: &str = "bench-start";
/// What a claim may add to a bare resume and the command.
const CLAIM_ADDS: Duration = Duration::from_micros(500);
/// The pool runs as many commands in a machine before it is paused; so does the script.
const WARM_UP: usize = 3;

fn main() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let firecracker = has_flag("--firecracker");
    let bare = Peer::new(firecracker).context("make the bare snapshot")?;
    let setup = if firecracker { Setup::firecracker() } else { Setup::qemu() };
    let platform = Platform::start(setup.with_pool("default=1"))?;
    runtime.block_on(platform.await_default_template())?;
    runtime.block_on(build_template(&platform))?;
    let floor = runtime.block_on(Floor::start())?;
    let mut bench = Bench {
        platform,
        bare,
        runtime,
        boot: Comparison::new("start boot", 1.25),
        restore: Comparison::new("start restore", 1.25).with_p99(1.5),
        claim: Comparison::new("start claim", 1.25),
        resume: Times::default(),
        floor,
        requests: Times::default(),
    };
    let count = samples(20);
    for sample in 0..=count {
        // The first of each reads files that were never read.
        bench.round(sample, sample > 0, sample % 4 == 0)?;
    }
    bench.report()
}

async fn build_template(platform: &Platform) -> Result<()> {
    let request = BuildTemplate {
        name: TEMPLATE.to_owned(),
        memory_mb: Some(MEMORY_MB),
        ..BuildTemplate::default()
    };
    platform.build_template(&request).await.map(drop)
}

/// The bare machine.
enum Peer {
    Qemu(Bare),
    Firecracker(BareFirecracker),
}

impl Peer {
    fn new(firecracker: bool) -> Result<Self> {
        if firecracker {
            let bare = BareFirecracker::new(MEMORY_MB)?;
            bare.make_snapshot()?;
            return Ok(Self::Firecracker(bare));
        }
        let bare = Bare::new(MEMORY_MB, 1)?;
        bare.make_snapshot()?;
        Ok(Self::Qemu(bare))
    }

    fn boot(&self, command: &[&str]) -> Result<Duration> {
        match self {
            Self::Qemu(bare) => bare.boot_to_first_byte(command),
            Self::Firecracker(bare) => bare.boot_to_first_byte(command),
        }
    }

    fn restore(&self, command: &[&str]) -> Result<Duration> {
        match self {
            Self::Qemu(bare) => bare.restore_to_first_byte(command),
            Self::Firecracker(bare) => bare.restore_to_first_byte(command),
        }
    }

    fn resume(&self, command: &[&str]) -> Result<(Duration, Duration)> {
        match self {
            Self::Qemu(bare) => bare.resume_to_first_byte(command, WARM_UP),
            Self::Firecracker(bare) => bare.resume_to_first_byte(command, WARM_UP),
        }
    }
}

struct Bench {
    platform: Platform,
    bare: Peer,
    runtime: tokio::runtime::Runtime,
    boot: Comparison,
    restore: Comparison,
    claim: Comparison,
    /// Of the bare machine, to the answer of its control.
    resume: Times,
    /// What two recorded requests cost at the least.
    floor: Floor,
    requests: Times,
}

impl Bench {
    fn round(&mut self, sample: usize, counts: bool, with_boot: bool) -> Result<()> {
        if with_boot {
            let request = CreateVm { template: Some("none".to_owned()), ..vm("boot", sample) };
            let ours = self.ours(&request, StartKind::Boot)?;
            let bare = self.bare.boot(COMMAND)?;
            push(&mut self.boot, counts, ours, bare);
        }
        let request = CreateVm { template: Some(TEMPLATE.to_owned()), ..vm("restore", sample) };
        let ours = self.ours(&request, StartKind::Restore)?;
        let bare = self.bare.restore(COMMAND)?;
        push(&mut self.restore, counts, ours, bare);
        self.runtime.block_on(self.platform.await_pools())?;
        let ours = self.ours(&vm("claim", sample), StartKind::Pool)?;
        let (resume, bare) = self.bare.resume(COMMAND)?;
        push(&mut self.claim, counts, ours, bare);
        let requests = self.runtime.block_on(self.floor.two_requests())?;
        if counts {
            self.resume.push(resume);
            self.requests.push(requests);
        }
        Ok(())
    }

    /// From the request to the first byte; then the VM is deleted.
    fn ours(&self, request: &CreateVm, kind: StartKind) -> Result<Duration> {
        let (took, view) = self.runtime.block_on(self.platform.first_output(request, COMMAND))?;
        let report = view.start.context("no report of the start")?;
        ensure!(report.kind == kind, "not a {kind:?}: {report:?}");
        Ok(took)
    }

    fn report(self) -> Result<()> {
        let Self { platform, boot, restore, claim, resume, requests, .. } = self;
        platform.finish()?;
        let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
        let gain = |boot: &Times, restore: &Times| {
            boot.quantile(0.5).as_secs_f64() / restore.quantile(0.5).as_secs_f64()
        };
        let (ours, bare) = (gain(&boot.ours, &restore.ours), gain(&boot.bare, &restore.bare));
        let adds = milliseconds(claim.ours.quantile(0.5)) - milliseconds(claim.bare.quantile(0.5));
        let results = [boot.report(), restore.report(), claim.report()];
        #[expect(clippy::print_stdout, reason = "the output of a benchmark")]
        if has_flag("--json") {
            let line = json!({
                "name": "start", "boot_to_restore_ours": ours, "boot_to_restore_bare": bare,
                "claim_adds_ms": adds, "bare_resume_ms": milliseconds(resume.quantile(0.5)),
                "two_bare_requests_ms": milliseconds(requests.quantile(0.5)),
                "holds": ours >= 0.8 * bare && adds <= milliseconds(CLAIM_ADDS),
            });
            println!("{line}");
        } else {
            println!(
                "boot/restore             ours {ours:6.2}   bare {bare:6.2}   part {:5.3} (bar 0.80)",
                ours / bare
            );
            println!(
                "claim adds               {adds:6.3} ms to a bare resume ({:.3} ms) and the command (bar {:.1} ms)",
                milliseconds(resume.quantile(0.5)),
                milliseconds(CLAIM_ADDS),
            );
            println!(
                "two bare requests        {:6.3} ms, each with a row committed before its answer",
                milliseconds(requests.quantile(0.5)),
            );
        }
        results.into_iter().collect()
    }
}

fn push(comparison: &mut Comparison, counts: bool, ours: Duration, bare: Duration) {
    if counts {
        comparison.ours.push(ours);
        comparison.bare.push(bare);
    }
}

fn vm(kind: &str, sample: usize) -> CreateVm {
    CreateVm {
        name: Some(format!("{kind}-{sample}")),
        memory_mb: Some(MEMORY_MB),
        ..CreateVm::default()
    }
}
