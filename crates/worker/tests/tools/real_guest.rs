//! Layers that a builder makes, in VMs that boot, are restored and come from a pool's template.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use aether_drivers::{
    BootSource, Driver, Host, HostConfig, KernelFlavour, LayerFile,
    qemu::{QemuAcceleration, QemuConfig, QemuDriver},
    sim::SimConfig,
};
use aether_images::{DEFAULT_IMAGE, ImageStore};
use aether_store::NewVm;
use aether_tools::BaseImage;
use aether_types::{
    DriverKind, ErrorCode, ExitStatus, Fault, Origin, Task, TaskId, TaskState, TemplateSpec, Vm,
    VmId, VmSpec, VmState,
};
use aether_worker::{ImageSource, ShutdownMode, WorkerConfig};

use crate::{
    recipes::{SAYS_ITSELF, Source, asked},
    rig::{Rig, command, template_spec, vm_spec},
};

const LIMIT: Duration = Duration::from_mins(5);

struct RealImages(Arc<ImageStore>);

#[expect(clippy::needless_pass_by_value, reason = "it is given to map_err")]
fn unusable(error: aether_images::ImageError) -> Fault {
    Fault::new(ErrorCode::ImageNotFound, error.to_string())
}

impl ImageSource for RealImages {
    fn resolve(&self, image: &str) -> Result<BootSource, Fault> {
        let set = self.0.resolve(image).map_err(unusable)?;
        Ok(BootSource {
            kernel: set.kernel,
            initrd: set.initrd,
            rootfs: set.rootfs,
            kernel_flavour: KernelFlavour::Debian,
        })
    }

    fn digest(&self, image: &str) -> Result<String, Fault> {
        Ok(self.0.get(image).map_err(unusable)?.digest.to_string())
    }

    fn base(&self, image: &str) -> Result<BaseImage, Fault> {
        let found = self.0.get(image).map_err(unusable)?;
        Ok(BaseImage {
            image: format!("{}@{}", found.name, found.digest),
            digest: found.rootfs.digest.to_string(),
            suite: found.suite,
            packages: found.packages,
        })
    }

    fn module_layer(&self, image: &str) -> Result<Option<LayerFile>, Fault> {
        let layer = self.0.module_layer(image).map_err(unusable)?;
        Ok(layer.map(|(blob, path)| LayerFile {
            name: "kernel-modules@1".to_owned(),
            path,
            digest: blob.digest.to_string(),
            bytes: blob.size_bytes,
        }))
    }

    fn pin(&self, _image: &str, _holder: &Path) -> Result<(), Fault> {
        Ok(())
    }
}

fn images() -> Option<Arc<ImageStore>> {
    let setting = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let folder = setting("AETHER_IMAGE_DIR")
        .or_else(|| Some(setting("AETHER_CACHE")?.join("images")))
        .or_else(|| Some(setting("HOME")?.join(".cache/aetherium/images")))?;
    folder.join("images").is_dir().then(|| Arc::new(ImageStore::open(folder).unwrap()))
}

struct House {
    rig: Rig,
    driver: Arc<dyn Driver>,
    host: Arc<Host>,
    source: Source,
    /// Nothing is to be cleaned up any more.
    is_closed: bool,
}

/// A test that fails leaves nothing either.
impl Drop for House {
    fn drop(&mut self) {
        if self.is_closed {
            return;
        }
        // It stops as in a crash, and makes nothing meanwhile.
        drop(self.rig.worker.take());
        let host = Arc::clone(&self.host);
        let cleaning = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(host.remove_all()).map_err(std::io::Error::other)
        });
        if !matches!(cleaning.join(), Ok(Ok(()))) {
            println!("cannot clean up after a failure");
        }
    }
}

impl House {
    /// `None` where this host cannot; says so.
    async fn open() -> Option<Self> {
        let Some(images) = images().filter(|_| rustix::process::geteuid().is_root()) else {
            println!("skipped: no images, or not root: ./dev test has both");
            return None;
        };
        let mut rig = Rig::new(SimConfig::default()).await;
        rig.crash().await;
        let config = HostConfig::new(rig.dir.path().join("host"));
        let host = Host::open(config, Arc::clone(&images)).await.unwrap();
        let acceleration = QemuAcceleration::Tcg;
        let config = QemuConfig { acceleration, ..QemuConfig::default() };
        let driver = match QemuDriver::open(Arc::clone(&host), config).await {
            Ok(driver) => Arc::new(driver) as Arc<dyn Driver>,
            Err(error) => {
                println!("skipped: {error}");
                return None;
            }
        };
        rig.parts.drivers = vec![Arc::clone(&driver)];
        rig.parts.images = Arc::new(RealImages(images));
        rig.parts.config = WorkerConfig { pools: Vec::new(), ..WorkerConfig::default() };
        let source = Source::open().await;
        let house = Self { rig, driver, host, source, is_closed: false };
        Some(house)
    }

    fn recipe(&self, name: &str, install: &str) {
        self.source.recipe(&self.rig.dir.path().join("catalogue"), name, install);
    }

    async fn start(&mut self) {
        self.rig.parts.tools = Source::tools(self.rig.dir.path());
        self.rig.start().await;
    }

    async fn ended(&self, id: TaskId) -> Task {
        let ended = async {
            let mut events = self.rig.listen();
            loop {
                let task = self.rig.store().task(id).await.unwrap().unwrap();
                if task.state.is_end() {
                    return task;
                }
                events.next().await;
            }
        };
        if let Ok(task) = tokio::time::timeout(LIMIT, ended).await {
            return task;
        }
        panic!("it does not end: {:?}", self.rig.store().task(id).await)
    }

    async fn try_create(&self, name: &str, origin: Origin, tools: &[&str]) -> Task {
        let spec = VmSpec {
            driver: DriverKind::Qemu,
            image: DEFAULT_IMAGE.to_owned(),
            memory_mb: 256,
            disk_mb: 1024,
            tools: asked(tools),
            ..vm_spec(origin)
        };
        let vm = NewVm { id: VmId::new(), name: name.to_owned(), spec };
        let task = self.rig.request_create_of(vm).await;
        self.ended(task.id).await
    }

    async fn create(&self, name: &str, origin: Origin, tools: &[&str]) -> Vm {
        let begun = Instant::now();
        let task = self.try_create(name, origin, tools).await;
        assert_eq!(task.state, TaskState::Completed, "{task:?}");
        let vm = self.rig.in_state(task.vm_id.unwrap(), VmState::Running).await;
        println!("{name}: {} ms, {:?}", begun.elapsed().as_millis(), vm.start);
        vm
    }

    async fn says(&self, vm: &Vm, script: &str) -> String {
        let execution = self.rig.execute(vm.id, command(&["sh", "-c", script])).await;
        let succeeded = execution.exit == Some(ExitStatus::Code(0));
        assert!(succeeded, "{script}: {execution:?}");
        self.rig.stdout(&execution).await
    }

    async fn machines(&self) -> usize {
        self.driver.list().await.unwrap().len()
    }

    async fn close_crashed(mut self) {
        self.host.remove_all().await.unwrap();
        self.is_closed = true;
    }

    async fn close(mut self) {
        self.rig.shut_down(ShutdownMode::StopVms).await;
        self.host.remove_all().await.unwrap();
        self.is_closed = true;
    }
}

fn template() -> TemplateSpec {
    TemplateSpec {
        driver: DriverKind::Qemu,
        image: DEFAULT_IMAGE.to_owned(),
        memory_mb: 256,
        disk_mb: 1024,
        tools: asked(&["hello@1.0.0"]),
        ..template_spec()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn vms_have_their_tools_by_whichever_way_they_begin() {
    let Some(mut house) = House::open().await else { return };
    house.recipe("hello", SAYS_ITSELF);
    house.recipe("other", SAYS_ITSELF);
    house.start().await;
    let one = house.create("one", Origin::Image, &["hello@1.0.0"]).await;
    assert_eq!(house.machines().await, 1, "the builder is gone");
    let two = house.create("two", Origin::Image, &["hello", "other@1"]).await;
    let artefact = "an artefact\n";
    assert_eq!(house.says(&one, "hello").await, format!("hello 1.0.0\n{artefact}"));
    let both = format!("hello 2.0.0\n{artefact}other 1.0.0\n{artefact}");
    assert_eq!(house.says(&two, "hello; other").await, both);
    // A script by its first line, another user, a clean environment.
    let ways = "printf '#!/usr/bin/env hello\n' >/tmp/s; chmod 755 /tmp/s; /tmp/s | head -n1; \
                sudo -u user hello | head -n1; env -i /bin/sh -c hello | head -n1";
    assert_eq!(house.says(&one, ways).await, "hello 1.0.0\n".repeat(3));

    let template = house.rig.request_build("with", template()).await;
    let built = house.ended(template.task_id).await;
    assert_eq!(built.state, TaskState::Completed, "{built:?}");
    let origin = Origin::Template(template.id);
    let same = house.create("same", origin, &["hello@1.0.0"]).await;
    let more = house.create("more", origin, &["hello@2.0.0", "other@1.0.0"]).await;
    assert_eq!(house.says(&same, "hello | head -n1").await, "hello 1.0.0\n");
    assert_eq!(house.says(&more, "hello; other").await, both);
    house.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_installer_that_does_wrong_leaves_nothing() {
    let Some(mut house) = House::open().await else { return };
    house.recipe("fails", "echo about to fail; exit 3");
    house.recipe("lies", "mkdir -p \"$DEST/usr/bin\"; printf '#!/bin/sh\\necho no\\n' >\"$DEST/usr/bin/lies\"; chmod 755 \"$DEST/usr/bin/lies\"");
    house.recipe("fills", "fallocate -l 100G \"$BUILD/big\"");
    house.recipe("talks", "curl -m 5 http://192.0.2.1/ || ip address; exit 4");
    house.recipe("hello", SAYS_ITSELF);
    house.start().await;
    for (tool, part) in [
        ("fails", "about to fail"),
        ("lies", "does not contain"),
        ("fills", "No space left"),
        ("talks", "could not be built"),
    ] {
        let task = house.try_create(tool, Origin::Image, &[tool]).await;
        let fault = task.error.unwrap();
        println!("{tool}: {fault}");
        assert_eq!(fault.code, ErrorCode::ToolBuildFailed, "{fault}");
        assert!(fault.message.contains(part) && fault.message.contains(tool), "{fault}");
        assert_eq!(house.machines().await, 0);
    }
    house.create("good", Origin::Image, &["hello"]).await;
    house.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_builder_does_not_outlive_its_worker_for_long() {
    let Some(mut house) = House::open().await else { return };
    house.recipe("slow", "touch /run/installing; sleep 600");
    house.start().await;
    let spec = VmSpec {
        driver: DriverKind::Qemu,
        image: DEFAULT_IMAGE.to_owned(),
        memory_mb: 256,
        disk_mb: 1024,
        tools: asked(&["slow"]),
        ..vm_spec(Origin::Image)
    };
    let vm = NewVm { id: VmId::new(), name: "slow".to_owned(), spec };
    let mut events = house.rig.listen();
    let task = house.rig.request_create_of(vm).await;
    let installs = async {
        loop {
            let now = house.rig.store().task(task.id).await.unwrap().unwrap();
            if now.progress.is_some_and(|progress| progress.now.contains("install")) {
                return;
            }
            events.next().await;
        }
    };
    tokio::time::timeout(LIMIT, installs).await.expect("the installer runs");
    assert_eq!(house.machines().await, 1);
    house.rig.crash().await;
    // The build goes on by itself, as it would for others who wait; a process that ends takes it
    // along. Here the next worker removes its machine all the same.
    house.rig.start().await;
    let gone = house.driver.list().await.unwrap();
    assert!(gone.iter().all(|machine| machine.spec.as_ref().is_none_or(|s| s.vm.is_some())));
    house.rig.crash().await;
    house.close_crashed().await;
}
