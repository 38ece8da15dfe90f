//! What a container is made with.

use std::{collections::HashMap, path::Path};

use bollard::models::{ContainerCreateBody, HostConfig, HostConfigLogConfig, Mount, MountType};

use super::{LABEL_OWNER, channel, owner_of, tools};
use crate::host::{Host, Record};

/// Inside the container: on a file system in memory, so that nothing of ours is in the image.
pub(super) const CHANNEL: &str = "/run/aether";
const AGENT: &str = "/run/aether-agent";

/// Processes and threads of one container.
const PROCESSES_MAX: i64 = 4096;

/// What root needs to install packages and to run commands as other users, and no more: nothing that
/// reaches beyond the container.
const CAPABILITIES: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "NET_BIND_SERVICE",
    "SETGID",
    "SETUID",
    "SYS_CHROOT",
];

/// Whether the engine is to bound the container's disk, which most storage cannot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Disk {
    Bounded,
    Open,
}

pub(super) fn body(host: &Host, record: &Record, image: &str, disk: Disk) -> ContainerCreateBody {
    let spec = &record.spec;
    let folder = host.directory(spec.id);
    let strings = |texts: &[&str]| Some(texts.iter().map(|&text| text.to_owned()).collect());
    let bounded = HashMap::from([("size".to_owned(), format!("{}M", spec.disk_mb))]);
    let memory_bytes = i64::from(spec.memory_mb) << 20;
    let log = [("max-size", "64k"), ("max-file", "1")];
    let mut mounts = vec![
        bind(&channel::folder(&folder), CHANNEL, Access::Write),
        bind(&agent_file(&folder), AGENT, Access::Read),
    ];
    if !spec.layers.is_empty() {
        mounts.push(bind(&tools::merged(&folder), "/usr", Access::Write));
    }
    let host_config = HostConfig {
        memory: Some(memory_bytes),
        // Memory and swap together: no swap.
        memory_swap: Some(memory_bytes),
        nano_cpus: Some(i64::from(spec.vcpus) * 1_000_000_000),
        pids_limit: Some(PROCESSES_MAX),
        cap_drop: strings(&["ALL"]),
        cap_add: strings(CAPABILITIES),
        security_opt: strings(&["no-new-privileges"]),
        privileged: Some(false),
        ipc_mode: Some("private".to_owned()),
        // Ours is plugged in as it starts.
        network_mode: Some("none".to_owned()),
        storage_opt: (disk == Disk::Bounded).then_some(bounded),
        log_config: Some(HostConfigLogConfig {
            typ: Some("json-file".to_owned()),
            config: Some(log.map(|(key, value)| (key.to_owned(), value.to_owned())).into()),
        }),
        tmpfs: Some(HashMap::from([(
            "/run".to_owned(),
            "rw,nosuid,nodev,exec,mode=0755,size=64m".to_owned(),
        )])),
        mounts: Some(mounts),
        ..HostConfig::default()
    };
    ContainerCreateBody {
        image: Some(image.to_owned()),
        hostname: Some(host_name(record)),
        cmd: strings(&[AGENT, "--container", CHANNEL]),
        entrypoint: Some(Vec::new()),
        working_dir: Some("/".to_owned()),
        labels: Some(HashMap::from([(LABEL_OWNER.to_owned(), owner_of(host))])),
        host_config: Some(host_config),
        ..ContainerCreateBody::default()
    }
}

/// The agent, out of the image's initramfs: it is the machine's own, so that the image may go.
pub(super) fn agent_file(folder: &Path) -> std::path::PathBuf {
    folder.join("agent")
}

/// The VM's name is told to its agent only, which may not set it here.
fn host_name(record: &Record) -> String {
    let spec = &record.spec;
    let id = spec.vm.map_or_else(|| spec.id.to_string(), |vm| vm.to_string());
    let end = id.rsplit(['-', '_']).next().unwrap_or_default();
    format!("vm-{end}")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

fn bind(source: &Path, target: &str, access: Access) -> Mount {
    Mount {
        typ: Some(MountType::BIND),
        source: Some(source.display().to_string()),
        target: Some(target.to_owned()),
        read_only: Some(access == Access::Read),
        ..Mount::default()
    }
}
