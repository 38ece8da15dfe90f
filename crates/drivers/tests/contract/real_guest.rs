//! The contract on real guests.

use crate::{
    rig::{Kind, Rig},
    suite,
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
