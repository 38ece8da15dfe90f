//! Tools as users have them: many in one VM, found by every way of running, two versions side by
//! side, and containers in a VM. The layers are fetched and built unless the cache has them.

use std::{
    fs,
    io::Read as _,
    process::Command,
    time::{Duration, Instant},
};

use aether_api::{
    CreateVm, VmView,
    client::{CallOptions, WriteOptions},
};
use aether_tests::{
    Platform, Setup,
    platform::{can_run_guests, small_vm},
};
use aether_types::StartKind;
use anyhow::{Context, Result, ensure};
use bytes::Bytes;

/// Of all layers of a VM, on a busy machine with an empty cache.
const BUILDS_MAX: Duration = Duration::from_mins(15);
const ONE_WAIT: Duration = Duration::from_mins(1);

const DEFAULTS: &[&str] = &["git", "nodejs@20", "bun", "claude-code"];
/// What a command prints, and where: `(what it shows, script, text that it prints)`.
type Check = (&'static str, &'static str, &'static str);

/// Of the defaults, with another Node.js, and what was added.
const VERSIONS: &[Check] = &[
    ("git", "git --version", "git version 2."),
    ("nodejs instead of the default", "node --version", "v22."),
    ("npm", "npm --version", "."),
    ("bun", "bun --version", "."),
    ("claude", "claude --version", "Claude Code"),
    ("claude-code", "claude-code --version", "Claude Code"),
    ("go, to the patch", "go version", "go1.23.1 "),
    ("python", "python --version", "Python 3.11."),
    ("rust", "rustc --version", "rustc 1."),
    ("cargo", "cargo --version", "cargo 1."),
];

const PROGRAMS: &[Check] = &[
    ("node", "node -e 'console.log(`hello ${6 * 7}`)'", "hello 42"),
    ("bun", "echo 'console.log(`hello ${6 * 7}`)' >h.ts; bun h.ts", "hello 42"),
    ("python", "python3 -c 'print(\"hello\", 6 * 7)'", "hello 42"),
    (
        "rust",
        "echo 'fn main() { println!(\"hello {}\", 6 * 7) }' >h.rs; rustc h.rs; ./h",
        "hello 42",
    ),
    (
        "go",
        "printf 'package main\nfunc main() { println(\"hello\", 6 * 7) }\n' >h.go; go run h.go 2>&1",
        "hello 42",
    ),
    (
        "git",
        "git init -q r && cd r && git config user.name me && git config user.email me@here && \
         git commit -q --allow-empty -m hello && git log",
        "hello",
    ),
];

/// However a program is started, it finds the tools.
const WAYS: &[Check] = &[
    ("no environment", "env -i /usr/bin/node --version", "v22."),
    ("the path of cron", "env -i PATH=/usr/bin:/bin SHELL=/bin/sh sh -c 'node --version'", "v22."),
    ("another user", "sudo -u user node --version", "v22."),
    ("a login shell", "bash -lc 'node --version'", "v22."),
    (
        "the first line of a script",
        "printf '#!/usr/bin/env node\nconsole.log(process.version)\n' >s; chmod 755 s; ./s",
        "v22.",
    ),
];

#[tokio::test]
async fn one_vm_has_the_defaults_and_more_at_other_versions() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let mut setup = Setup::qemu();
    for tool in DEFAULTS {
        setup = setup.with(&["--default-tool", tool]);
    }
    let platform = Platform::start(setup)?;
    let request = CreateVm {
        memory_mb: Some(2048),
        disk_mb: Some(4096),
        tools: texts(&["go@1.23.1", "python@3.11", "rust", "nodejs@22"]),
        ..small_vm("many")
    };
    let many = create(&platform, &request).await?;
    let names: Vec<&str> = many.tools.iter().map(|tool| tool.name.as_str()).collect();
    ensure!(names == ["bun", "claude-code", "git", "go", "nodejs", "python", "rust"], "{names:?}");
    for checks in [VERSIONS, PROGRAMS, WAYS] {
        for check in checks {
            prints(&platform, "many", *check).await?;
        }
    }
    // Two versions at once, each in its VM.
    let request =
        CreateVm { tools: texts(&["nodejs@20"]), default_tools: Some(false), ..small_vm("older") };
    create(&platform, &request).await?;
    prints(&platform, "older", ("nodejs 20", "node --version", "v20.")).await?;
    prints(&platform, "many", ("nodejs 22", "node --version", "v22.")).await?;
    platform.delete("many").await?;
    platform.delete("older").await?;
    platform.finish()
}

/// Recipes that a user adds: two back ends of mise, and the daemon that runs what is to run at a time.
const RECIPES: &[(&str, &str)] = &[
    (
        "rimraf.toml",
        r#"
name = "rimraf"
summary = "Removes folders"
commands = ["rimraf"]
verify = "rimraf --version"
expect = ["{version}"]

[source]
kind = "mise"
backend = "npm:rimraf"
"#,
    ),
    (
        "cowsay.toml",
        r#"
name = "cowsay"
summary = "A cow that speaks"
commands = ["cowsay"]
verify = "cowsay -t moo"
expect = ["moo"]

[source]
kind = "mise"
backend = "pipx:cowsay"
"#,
    ),
    (
        "cron.toml",
        r#"
name = "cron"
summary = "Runs commands at their times"
commands = ["cron"]
install = """
unpack_debs
put_command "$DEST/usr/sbin/cron"
"""
verify = "test -x /usr/bin/cron && echo there"
expect = ["there"]

[source]
kind = "debian"
packages = ["cron"]
"#,
    ),
];

const ADDED: &[Check] = &[
    ("a back end of mise, npm", "mkdir -p d/e; rimraf d; ls -d d || echo gone", "gone"),
    ("a back end of mise, pipx", "cowsay -t hello", "hello"),
    // The reader waits for the job to write; a minute is about to end.
    (
        "cron",
        "groupadd -r crontab; mkfifo said; chmod 666 said; mkdir -p /etc/cron.d; \
         echo '* * * * * user cowsay -t moo >/tmp/said 2>&1' >/etc/cron.d/cow; \
         date -s \"$(date +'%F %H:%M:57')\" >/dev/null; cron; cat said",
        "moo",
    ),
];

#[tokio::test]
async fn a_vm_of_a_pool_gets_the_tools_that_it_asks_for() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let recipes = tempfile::tempdir()?;
    for (name, text) in RECIPES {
        fs::write(recipes.path().join(name), text)?;
    }
    let folder = recipes.path().to_str().context("a path of text")?;
    // Where an earlier run's template with these tools was kept, the VM would begin as that.
    let templates = tempfile::tempdir()?;
    let template_dir = templates.path().to_str().context("a path of text")?;
    let setup = Setup::qemu().with_pool("default=1").with(&[
        "--tools-catalogue",
        folder,
        "--template-dir",
        template_dir,
    ]);
    let platform = Platform::start(setup)?;
    platform.await_default_template().await?;
    platform.await_pools().await?;
    let tools = texts(&["rimraf", "cowsay", "cron"]);
    let request = CreateVm { tools, ..small_vm("added") };
    let added = create(&platform, &request).await?;
    let kind = added.start.as_ref().map(|start| start.kind);
    ensure!(kind == Some(StartKind::Pool), "{:?}\n{}", added.start, platform.log());
    for check in ADDED {
        prints(&platform, "added", *check).await?;
    }
    platform.delete("added").await?;
    platform.finish()
}

#[tokio::test]
async fn a_vm_runs_containers() -> Result<()> {
    if !can_run_guests() {
        return Ok(());
    }
    let platform = Platform::start(Setup::qemu())?;
    let request = CreateVm {
        memory_mb: Some(1024),
        disk_mb: Some(2048),
        tools: texts(&["docker"]),
        ..small_vm("boxes")
    };
    create(&platform, &request).await?;
    let body = futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from(image()?))]);
    let options = WriteOptions::default();
    platform.client().write_file("boxes", "/tmp/image.tar", &options, body).await?;
    for check in [
        ("the daemon", "docker-up && docker info --format '{{.Driver}}'", "overlay2"),
        ("an image", "docker import /tmp/image.tar box", "sha256:"),
        ("a container", "docker run --rm box /bin/sh -c 'echo inside; echo $$'", "inside\n1\n"),
        ("another user", "sudo -u user docker run --rm box /bin/sh -c 'echo too'", "too"),
        (
            "what is left when it ends",
            "docker run -d --name lives box /bin/sh -c 'read forever </dev/ptmx' >/dev/null && \
             docker kill lives && docker rm lives && docker ps -aq | wc -l",
            "0\n",
        ),
    ] {
        prints(&platform, "boxes", check).await?;
    }
    platform.delete("boxes").await?;
    platform.finish()
}

/// As [`Platform::create`], for layers that have to be built first, one after the other.
async fn create(platform: &Platform, request: &CreateVm) -> Result<VmView> {
    let accepted = platform.client().create_vm(request, &CallOptions::default()).await?;
    let (vm, task) = (accepted.vm_id().to_string(), accepted.task_id().context("a task")?);
    let deadline = Instant::now() + BUILDS_MAX;
    loop {
        let task = platform.client().task(task, Some(ONE_WAIT)).await?;
        if task.status.is_end() {
            ensure!(task.error.is_none(), "{task:?}");
            return Ok(platform.client().vm(&vm).await?);
        }
        ensure!(Instant::now() < deadline, "{task:?}\n{}", platform.log());
    }
}

fn texts(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|&text| text.to_owned()).collect()
}

async fn prints(platform: &Platform, vm: &str, (what, script, text): Check) -> Result<()> {
    let script = format!("cd /tmp && {{ {script}\n}}");
    let ended = platform.execute(vm, &["sh", "-ec", &script]).await?;
    let printed = ended.stdout.as_deref().unwrap_or_default();
    ensure!(ended.exit_code == Some(0) && printed.contains(text), "{what}: {ended:?}");
    Ok(())
}

/// A root file system of a shell and its libraries: there is no registry to have an image from.
fn image() -> Result<Vec<u8>> {
    let listed = Command::new("ldd").arg("/bin/sh").output().context("ldd")?;
    let listed = String::from_utf8(listed.stdout)?;
    let libraries = listed.split_whitespace().filter(|word| word.starts_with('/'));
    let mut tar = Command::new("tar");
    tar.args(["--create", "--dereference", "--absolute-names", "--file=-", "/bin/sh"]);
    let mut child = tar.args(libraries).stdout(std::process::Stdio::piped()).spawn()?;
    let mut image = Vec::new();
    child.stdout.take().context("a pipe")?.read_to_end(&mut image)?;
    ensure!(child.wait()?.success(), "tar");
    Ok(image)
}
