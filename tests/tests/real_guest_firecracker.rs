//! The whole platform over a real, jailed Firecracker, where the host can run one.

use aether_tests::{
    Platform, Setup,
    platform::{can_run_guests, env_path, small_vm},
};
use aether_types::DriverKind;
use anyhow::{Context, Result, ensure};

#[tokio::test]
async fn a_vm_lives_and_runs_commands_under_firecracker() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let (Some(program), Some(jailer)) = (env_path("AETHER_FIRECRACKER"), env_path("AETHER_JAILER"))
    else {
        println!("skipped: AETHER_FIRECRACKER and AETHER_JAILER name no programs");
        return Ok(());
    };
    let text = |path: std::path::PathBuf| path.to_str().map(ToOwned::to_owned);
    let setup = Setup::of("firecracker").with(&[
        "--firecracker",
        &text(program).context("a path that is no text")?,
        "--jailer",
        &text(jailer).context("a path that is no text")?,
        "--image",
        "debian-fctest",
        "--allow-vulnerable-firecracker",
    ]);
    let platform = match Platform::start(setup) {
        Ok(platform) => platform,
        // Its own word for a host without a KVM that runs a guest.
        Err(error) if error.to_string().contains("driver_unavailable") => {
            println!("skipped: Firecracker runs no guest on this host");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let vm = platform.create(&small_vm("jailed")).await?;
    ensure!(vm.driver == DriverKind::Firecracker);
    let id = vm.id.to_string();
    let execution = platform.execute(&id, &["sh", "-c", "hostname; echo err >&2; exit 3"]).await?;
    ensure!(execution.exit_code == Some(3), "{execution:?}");
    ensure!(execution.stdout.as_deref() == Some("jailed\n"), "{execution:?}");
    ensure!(execution.stderr.as_deref() == Some("err\n"), "{execution:?}");
    platform.delete(&id).await?;
    platform.finish()
}
