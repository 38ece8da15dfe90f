//! The contract on real guests.

use std::{
    os::unix::fs::PermissionsExt as _,
    time::{Duration, Instant},
};

use crate::{
    layers,
    rig::{Kind, Rig},
    snapshots, suite,
};

macro_rules! contract {
    ($module:ident, $kind:expr, $megabytes:literal, $connections:literal) => {
        mod $module {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn lifecycle() {
                if let Some(rig) = Rig::open($kind).await {
                    suite::lifecycle(rig).await;
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn delete_from_every_state() {
                if let Some(rig) = Rig::open($kind).await {
                    suite::delete_from_every_state(rig).await;
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn exit_reasons() {
                if let Some(rig) = Rig::open($kind).await {
                    suite::exit_reasons(rig).await;
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn adoption() {
                if let Some(rig) = Rig::open($kind).await {
                    suite::adoption(rig).await;
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn faults() {
                if let Some(rig) = Rig::open($kind).await {
                    suite::faults(rig).await;
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn crashes() {
                if let Some(rig) = Rig::open($kind).await {
                    let worker = concat!("real_guest::", stringify!($module), "::crashing_worker");
                    suite::crashes(rig, worker).await;
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn crashing_worker() {
                suite::crashing_worker($kind).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn start_is_bounded() {
                if let Some(rig) = Rig::open($kind).await {
                    suite::start_is_bounded(rig).await;
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn channel() {
                if let Some(rig) = Rig::open($kind).await {
                    suite::channel(rig, $megabytes, $connections).await;
                }
            }
        }
    };
}

contract!(qemu, Kind::Qemu, 64, 64);
contract!(qemu_debian, Kind::QemuDebian, 64, 64);

/// Of snapshots; what a host restores, each kind tries.
macro_rules! snapshots {
    ($module:ident, $kind:expr) => {
        mod $module {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn clones() {
                if let Some(rig) = Rig::open($kind).await {
                    snapshots::clones(rig, snapshots::clone_count($kind)).await;
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn generations() {
                if let Some(rig) = Rig::open($kind).await {
                    snapshots::generations(rig).await;
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn suspension() {
                if let Some(rig) = Rig::open($kind).await {
                    snapshots::suspension(rig).await;
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn refusals() {
                if let Some(rig) = Rig::open($kind).await {
                    snapshots::refusals(rig).await;
                }
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn claims() {
                if let Some(rig) = Rig::open($kind).await {
                    snapshots::claims(rig).await;
                }
            }
        }
    };
}

snapshots!(qemu_snapshots, Kind::Qemu);
snapshots!(qemu_debian_snapshots, Kind::QemuDebian);
snapshots!(firecracker_jailed_snapshots, Kind::FirecrackerJailed);

/// Tools and builders.
mod tool_layers {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn tools() {
        if let Some(rig) = Rig::open(Kind::Qemu).await {
            layers::tools(rig).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn tools_on_debian() {
        if let Some(rig) = Rig::open(Kind::QemuDebian).await {
            layers::tools(rig).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn many_and_wrong() {
        if let Some(rig) = Rig::open(Kind::QemuDebian).await {
            layers::many_and_wrong(rig).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn tools_under_firecracker() {
        if let Some(rig) = Rig::open(Kind::FirecrackerJailed).await {
            layers::tools(rig).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn output() {
        if let Some(rig) = Rig::open(Kind::Qemu).await {
            layers::output(rig).await;
        }
    }
}

/// Every step of a snapshot's life, on the kernel that boots fastest, and what Firecracker alone has.
mod snapshot_steps {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn qemu_faults() {
        if let Some(rig) = Rig::open(Kind::Qemu).await {
            snapshots::faults(rig, |_| true).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn qemu_crashes() {
        if let Some(rig) = Rig::open(Kind::Qemu).await {
            let worker = "real_guest::snapshot_steps::qemu_crashing_worker";
            snapshots::crashes(rig, worker).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn qemu_crashing_worker() {
        suite::crashing_worker(Kind::Qemu).await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn firecracker_faults() {
        let own = |point: &str| {
            ["make home", "load", "snapshot"].iter().any(|begin| point.starts_with(begin))
        };
        if let Some(rig) = Rig::open(Kind::FirecrackerJailed).await {
            snapshots::faults(rig, own).await;
        }
    }
}

/// Where an emulator stands behind KVM a boot takes ten seconds of a processor, so the two loops over
/// every step, which boot dozens of times, run on the engine that Firecracker shares with QEMU.
mod firecracker_jailed {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn lifecycle() {
        if let Some(rig) = Rig::open(Kind::FirecrackerJailed).await {
            suite::lifecycle(rig).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn delete_from_every_state() {
        if let Some(rig) = Rig::open(Kind::FirecrackerJailed).await {
            suite::delete_from_every_state(rig).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn exit_reasons() {
        if let Some(rig) = Rig::open(Kind::FirecrackerJailed).await {
            suite::exit_reasons(rig).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn adoption() {
        if let Some(rig) = Rig::open(Kind::FirecrackerJailed).await {
            suite::adoption(rig).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn start_is_bounded() {
        if let Some(rig) = Rig::open(Kind::FirecrackerJailed).await {
            suite::start_is_bounded(rig).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn channel() {
        if let Some(rig) = Rig::open(Kind::FirecrackerJailed).await {
            suite::channel(rig, 2, 4).await;
        }
    }
}

/// Without the jailer, what the jailer has a part in: the home, the process and its files.
mod firecracker {
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn lifecycle() {
        if let Some(rig) = Rig::open(Kind::Firecracker).await {
            suite::lifecycle(rig).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn generations() {
        if let Some(rig) = Rig::open(Kind::Firecracker).await {
            snapshots::generations(rig).await;
        }
    }
}

#[tokio::test]
async fn qemu_is_confined_and_keeps_the_token_to_itself() {
    is_confined(Kind::Qemu).await;
}

#[tokio::test]
async fn jailed_firecracker_is_confined_and_keeps_the_token_to_itself() {
    is_confined(Kind::FirecrackerJailed).await;
}

async fn is_confined(kind: Kind) {
    let Some(rig) = Rig::open(kind).await else { return };
    let vm = rig.boot().await;
    let machine = rig.driver().inspect(vm.id).await.unwrap().unwrap();
    let proc =
        |name: &str| std::fs::read(format!("/proc/{}/{name}", machine.pid.unwrap())).unwrap();
    let cmdline = String::from_utf8_lossy(&proc("cmdline")).into_owned();
    assert!(!cmdline.contains(&vm.token.to_hex()), "{cmdline}");
    let log = String::from_utf8_lossy(&proc("fd/1")).into_owned();
    assert!(!log.contains(&vm.token.to_hex()), "{log}");
    let status = String::from_utf8(proc("status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().to_owned()
    };
    assert_ne!(field("Uid:"), "0");
    assert_ne!(field("Gid:"), "0");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    assert_eq!(field("CapEff:"), "0000000000000000");
    let mode = |name: &str| {
        std::fs::metadata(rig.folder().join(name)).unwrap().permissions().mode() & 0o777
    };
    let folder = format!("vms/{}", vm.id);
    if kind == Kind::FirecrackerJailed {
        let root = std::fs::read_dir(format!("/proc/{}/root/", machine.pid.unwrap())).unwrap();
        let names: Vec<_> = root.map(|entry| entry.unwrap().file_name()).collect();
        assert!(names.contains(&"rootfs".into()) && !names.contains(&"etc".into()), "{names:?}");
    }
    assert_eq!((mode("journal"), mode(&folder)), (0o600, 0o700));
    rig.driver().delete(vm.id).await.unwrap();
    rig.close().await;
}

#[tokio::test]
async fn kvm_is_used_only_where_a_probe_boots() {
    let Some(mut rig) = Rig::open(Kind::QemuAuto).await else { return };
    println!("{:?}", rig.driver().capabilities());
    let found = rig.driver().capabilities();
    assert_eq!(found.accelerated, found.isolation.starts_with("hardware"));
    // What was found is kept.
    let begun = Instant::now();
    rig.reopen().await;
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(rig.driver().capabilities(), found);
    if found.accelerated {
        suite::lifecycle(rig).await;
    } else {
        rig.close().await;
    }
}
