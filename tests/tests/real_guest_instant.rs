//! Restores and pools in number, and kills in the middle of them.

use std::{collections::BTreeSet, fs, time::Duration};

use aether_api::{
    BuildTemplate, CreateSnapshot, CreateVm, ForkVm,
    client::{CallOptions, SnapshotQuery, VmQuery},
};
use aether_tests::{
    Platform, Random, Setup,
    platform::{can_run_guests, small_vm},
    wire,
};
use aether_types::{
    ErrorCode, SnapshotState, StartKind, TemplateFile, TemplateReady, TemplateState, TemplateStep,
    VmId,
};
use anyhow::{Context, Result, ensure};

/// What may not grow from cycle to cycle.
#[derive(Debug, Clone, Copy)]
struct Held {
    descriptors: usize,
    threads: usize,
    memory_kib: u64,
    links: usize,
    files: usize,
}

impl Held {
    fn by(platform: &Platform) -> Result<Self> {
        let pid = platform.pid().context("it does not run")?.as_raw_pid();
        let count = |path: String| fs::read_dir(path).map(Iterator::count);
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let memory = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        let memory = memory.context("no RssAnon")?.trim().trim_end_matches(" kB");
        Ok(Self {
            descriptors: count(format!("/proc/{pid}/fd"))?,
            threads: count(format!("/proc/{pid}/task"))?,
            memory_kib: memory.trim().parse()?,
            links: wire::links_in(&platform.namespace()?)?,
            files: files_below(&platform.data_dir())?,
        })
    }
}

fn files_below(path: &std::path::Path) -> Result<usize> {
    let mut count = 0;
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        count += 1;
        if entry.file_type()?.is_dir() {
            count += files_below(&entry.path())?;
        }
    }
    Ok(count)
}

#[tokio::test]
async fn three_hundred_restored_vms_come_and_go_without_a_trace() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let platform = Platform::start(Setup::qemu())?;
    platform.await_default_template().await?;
    let mut settled = None;
    for cycle in 0..300 {
        let name = format!("cycle-{cycle}");
        let vm = platform.create(&small_vm(&name)).await?;
        let kind = vm.start.as_ref().map(|start| start.kind);
        ensure!(kind == Some(StartKind::Restore), "cycle {cycle}: {vm:?}\n{}", platform.log());
        let said = platform.execute(&name, &["echo", &name]).await?;
        ensure!(said.stdout.as_deref() == Some(&*format!("{name}\n")), "{said:?}");
        platform.delete(&name).await?;
        if cycle == 40 {
            settled = Some(Held::by(&platform)?);
        }
    }
    let (before, after) = (settled.context("not settled")?, Held::by(&platform)?);
    ensure!(after.links <= before.links, "links: {before:?} {after:?}");
    ensure!(after.files <= before.files + 2, "files: {before:?} {after:?}");
    ensure!(after.descriptors <= before.descriptors + 8, "descriptors: {before:?} {after:?}");
    ensure!(after.threads <= before.threads + 8, "threads: {before:?} {after:?}");
    // The store's page cache and the allocator settle; a leak of 20 KiB a cycle would show.
    ensure!(after.memory_kib <= before.memory_kib + 5 * 1024, "memory: {before:?} {after:?}");
    platform.finish()
}

/// The platform is killed at a moment that moves through snapshot, restore, fork, and the refill
/// of a pool. What was begun ends, no half snapshot is offered, and nothing is left.
#[tokio::test]
async fn kills_amid_snapshots_restores_forks_and_refills_leave_nothing() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let mut platform = Platform::start(Setup::qemu().with_pool("default=1..2"))?;
    platform.await_default_template().await?;
    let mut random = Random::from_environment();
    for round in 0..24 {
        platform.create(&small_vm("source")).await?;
        let mut tasks = begin(&platform, round).await?;
        let moment = Duration::from_millis(random.below(900));
        tokio::time::sleep(moment).await;
        platform.kill()?;
        platform.restart()?;
        for task in tasks.drain(..) {
            let ended = platform.client().task(task, Some(Duration::from_mins(2))).await?;
            ensure!(ended.status.is_end(), "{ended:?} (killed at {moment:?})\n{}", platform.log());
        }
        let snapshots = platform.client().snapshots(&SnapshotQuery::default()).await?.items;
        for (index, snapshot) in snapshots.iter().enumerate() {
            let id = snapshot.id.to_string();
            if snapshot.state == SnapshotState::Ready {
                // What is offered is whole.
                let name = format!("whole-{index}");
                let request = CreateVm {
                    name: Some(name.clone()),
                    snapshot: Some(id.clone()),
                    ..CreateVm::default()
                };
                platform.create(&request).await?;
                let said = platform.execute(&name, &["echo", "whole"]).await?;
                ensure!(said.stdout.as_deref() == Some("whole\n"), "{said:?}");
            }
            platform.client().delete_snapshot(&id).await?;
        }
        for vm in platform.client().vms(&VmQuery::default()).await?.items {
            platform.delete(&vm.id.to_string()).await?;
        }
    }
    // What was deleted in the last moments is removed by the next start at the latest.
    platform.terminate()?;
    platform.restart()?;
    platform.terminate()?;
    let left = platform.leftovers()?;
    ensure!(left.is_empty(), "left over: {left:#?}\n{}", platform.log());
    for folder in ["snapshots/entries", "snapshots/drafts", "snapshots/trash"] {
        let path = platform.data_dir().join(folder);
        let count = fs::read_dir(&path).map_or(0, Iterator::count);
        ensure!(count == 0, "{folder} has {count} entries\n{}", platform.log());
    }
    Ok(())
}

/// Work on `source` that is under way when this returns.
async fn begin(platform: &Platform, round: u32) -> Result<Vec<aether_types::TaskId>> {
    let (client, no_wait) = (platform.client(), CallOptions::default());
    let mut tasks = Vec::new();
    match round % 3 {
        0 => {
            let request = CreateSnapshot { name: Some(format!("cut-{round}")) };
            tasks.extend(client.create_snapshot("source", &request, &no_wait).await?.task_id());
            let request = CreateVm {
                name: Some("restored".into()),
                snapshot: Some(format!("cut-{round}")),
                ..CreateVm::default()
            };
            tasks.extend(client.create_vm(&request, &no_wait).await?.task_id());
        }
        1 => {
            let request =
                ForkVm { count: Some(3), name_prefix: Some("fork".into()), ..ForkVm::default() };
            match client.fork_vm("source", &request, &no_wait).await? {
                aether_api::client::Waited::Accepted(fork) => {
                    tasks.push(fork.task_id);
                    tasks.extend(fork.vms.iter().map(|vm| vm.task_id));
                }
                aether_api::client::Waited::Done(_) => {}
            }
        }
        // Claims, so that the pool is filled again meanwhile; and a memory that is kept.
        _ => {
            for name in ["claim-1", "claim-2"] {
                tasks.extend(client.create_vm(&small_vm(name), &no_wait).await?.task_id());
            }
            tasks.extend(client.suspend_vm("source", &no_wait).await?.task_id());
        }
    }
    Ok(tasks)
}

#[tokio::test]
async fn a_pool_gives_ready_vms_and_fills_itself_again() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let platform = Platform::start(Setup::qemu().with_pool("default=2..3"))?;
    platform.await_default_template().await?;
    platform.await_pools().await?;
    let mut identities = BTreeSet::new();
    for round in 0..3 {
        // More than the pool has, at once: the rest are restored, none waits for it.
        let names: Vec<String> = (0..4).map(|index| format!("vm-{round}-{index}")).collect();
        let requests: Vec<CreateVm> = names.iter().map(|name| small_vm(name)).collect();
        let created = requests.iter().map(|request| platform.create(request));
        let created = futures::future::try_join_all(created).await?;
        let kinds: Vec<_> = created.iter().filter_map(|vm| Some(vm.start.as_ref()?.kind)).collect();
        let claimed = kinds.iter().filter(|kind| **kind == StartKind::Pool).count();
        ensure!(claimed >= 2, "{kinds:?}\n{}", platform.log());
        ensure!(kinds.iter().all(|kind| *kind != StartKind::Boot), "{kinds:?}");
        for name in &names {
            let script = "cat /etc/hostname /etc/machine-id; date +%s; head -c 16 /dev/urandom | \
                 od -An -tx1; cat /sys/class/net/eth0/address";
            let said = platform.execute(name, &["/bin/sh", "-c", script]).await?;
            let said = said.stdout.unwrap_or_default();
            ensure!(said.starts_with(&format!("{name}\n")), "{name}: {said}");
            ensure!(identities.insert(said), "two VMs are one");
            platform.delete(name).await?;
        }
        platform.await_pools().await?;
    }
    let pools = platform.client().pools().await?.items;
    ensure!(pools.len() == 1 && pools[0].hits >= 6 && pools[0].misses >= 1, "{pools:?}");
    platform.finish()
}

#[tokio::test]
async fn templates_are_built_once_and_every_vm_begins_as_they_end() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let platform = Platform::start(Setup::qemu())?;
    let step = |run: &str| TemplateStep { run: run.into(), timeout_s: None };
    let request = BuildTemplate {
        name: "web".into(),
        tag: Some("v1".into()),
        memory_mb: Some(256),
        // The second makes it another template than that of an earlier run.
        env: [
            ("GREETING".to_owned(), "hello".to_owned()),
            ("RUN".to_owned(), VmId::new().to_string()),
        ]
        .into(),
        files: vec![TemplateFile {
            path: "/opt/words/first".into(),
            content: "from a file\n".into(),
            mode: 0o600,
        }],
        steps: vec![
            step("echo $GREETING > /opt/words/second"),
            step("mkdir -p /srv && cp /opt/words/* /srv/ && echo built"),
        ],
        start: Some("nc -l -k -p 8000 -e /bin/cat || while :; do sleep 1000; done".into()),
        ready: Some(TemplateReady { command: "test -s /srv/second".into(), timeout_s: None }),
        ..BuildTemplate::default()
    };
    let built = platform.build_template(&request).await?;
    ensure!(
        built.state == TemplateState::Ready && built.progress.log.contains("built"),
        "{built:?}"
    );
    for template in ["web:v1", &built.id.to_string()] {
        let mut request = small_vm("from-template");
        request.template = Some(template.to_owned());
        let vm = platform.create(&request).await?;
        ensure!(vm.start.as_ref().is_some_and(|s| s.kind == StartKind::Restore), "{vm:?}");
        let script = "cat /srv/first /srv/second; echo $GREETING; stat -c %a /opt/words/first; \
             ps ax | grep -c '[8]000'";
        let said = platform.execute("from-template", &["/bin/sh", "-c", script]).await?;
        let said = said.stdout.unwrap_or_default();
        ensure!(said.starts_with("from a file\nhello\nhello\n600\n"), "{said}");
        ensure!(!said.ends_with("600\n0\n"), "what it starts does not run: {said}");
        platform.delete("from-template").await?;
    }
    // The same content under another name is there already.
    let again = BuildTemplate { name: "same".into(), ..request.clone() };
    let again = platform.build_template(&again).await?;
    ensure!(again.digest == built.digest, "{again:?}");
    // Another size boots on the template's disk.
    let mut larger = small_vm("larger");
    larger.template = Some("web:v1".into());
    larger.memory_mb = Some(384);
    let vm = platform.create(&larger).await?;
    ensure!(vm.start.as_ref().is_some_and(|s| s.kind == StartKind::Boot), "{vm:?}");
    let said = platform.execute("larger", &["cat", "/srv/second"]).await?;
    ensure!(said.stdout.as_deref() == Some("hello\n"), "{said:?}");
    platform.delete("larger").await?;

    // A step that fails is named, with its last words, and leaves nothing.
    let bad = BuildTemplate {
        name: "bad".into(),
        steps: vec![step("true"), step("echo no such luck >&2; exit 3")],
        ..request.clone()
    };
    let error = platform.build_template(&bad).await.expect_err("a failing step");
    let text = format!("{error:#}");
    ensure!(text.contains("no such luck") && text.contains('3') && text.contains('2'), "{text}");
    let Some(aether_api::client::ClientError::Problem(problem)) = error.downcast_ref() else {
        return Err(error);
    };
    ensure!(problem.error_code() == Some(ErrorCode::TemplateBuildFailed), "{problem:?}");
    let vms = platform.client().vms(&VmQuery::default()).await?.items;
    ensure!(vms.is_empty(), "{vms:?}");
    for name in ["web:v1", "same:v1"] {
        platform.client().delete_template(name).await?;
    }
    platform.finish()
}
