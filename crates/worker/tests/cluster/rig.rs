//! A worker over a simulated host, with the real store and queue in a temporary folder. What the
//! gateway does to record work is done here by hand.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use aether_drivers::{
    BootSource, Driver, KernelFlavour, LayerFile,
    sim::{SimConfig, SimDriver, SimHost},
};
use aether_events::{Event, LocalBus, Received, Subscription};
use aether_images::SnapshotStore;
use aether_queue::{Entry, Lane, Queue, SqliteQueue};
use aether_store::{
    Capacity, Durability, NewExecution, NewSnapshot, NewTask, NewTemplate, NewVm, SqliteStore,
    Store,
};
use aether_streams::Sessions;
use aether_tools::{BaseImage, Tools, ToolsConfig};
use aether_types::{
    DriverKind, Execution, ExecutionId, ExecutionSpec, Fault, NetworkPolicy, Origin, OutputStream,
    Priority, Snapshot, SnapshotId, SnapshotPurpose, Task, TaskId, TaskKind, TaskState, Template,
    TemplateId, TemplateSpec, TemplateState, Vm, VmId, VmSpec, VmState, WorkerId, limits,
};
use aether_worker::{ImageSource, ShutdownMode, Worker, WorkerConfig, WorkerParts};
use tempfile::TempDir;

/// Far longer than anything here takes.
const LIMIT: Duration = Duration::from_secs(25);

pub(crate) struct Rig {
    pub(crate) host: Arc<SimHost>,
    pub(crate) parts: WorkerParts,
    pub(crate) worker: Option<Worker>,
    pub(crate) dir: TempDir,
}

struct AnyImage;

impl ImageSource for AnyImage {
    fn resolve(&self, _image: &str) -> Result<BootSource, Fault> {
        Ok(BootSource {
            kernel: PathBuf::from("kernel"),
            initrd: PathBuf::from("initrd"),
            rootfs: PathBuf::from("rootfs"),
            kernel_flavour: KernelFlavour::Debian,
        })
    }

    fn base(&self, image: &str) -> Result<BaseImage, Fault> {
        Ok(BaseImage {
            image: image.to_owned(),
            digest: self.digest(image)?,
            suite: "bookworm".to_owned(),
            packages: Vec::new(),
        })
    }

    fn module_layer(&self, _image: &str) -> Result<Option<LayerFile>, Fault> {
        Ok(None)
    }

    fn digest(&self, _image: &str) -> Result<String, Fault> {
        Ok(format!("blake3:{}", "0".repeat(64)))
    }

    fn pin(&self, _image: &str, _holder: &Path) -> Result<(), Fault> {
        Ok(())
    }
}

pub(crate) fn command(words: &[&str]) -> ExecutionSpec {
    ExecutionSpec {
        command: words[0].to_owned(),
        args: words[1..].iter().map(|&word| word.to_owned()).collect(),
        ..ExecutionSpec::default()
    }
}

fn new_task(kind: TaskKind) -> NewTask {
    NewTask {
        id: TaskId::new(),
        kind,
        priority: Priority::Default,
        max_attempts: if kind == TaskKind::VmCreate { 3 } else { limits::TASK_ATTEMPTS_MAX },
        project: None,
    }
}

pub(crate) fn vm_spec(origin: Origin) -> VmSpec {
    VmSpec {
        vcpus: 1,
        memory_mb: 256,
        disk_mb: 64,
        image: "debian".into(),
        driver: DriverKind::Sim,
        env: [("GREETING".to_owned(), "hello".to_owned())].into(),
        labels: std::collections::BTreeMap::new(),
        timeout_s: None,
        network: NetworkPolicy::default(),
        origin,
        tools: Vec::new(),
        placement: aether_types::Placement::default(),
    }
}

/// A size that fits `vm_spec`, and nothing on top.
pub(crate) fn template_spec() -> TemplateSpec {
    TemplateSpec {
        image: "debian".into(),
        driver: DriverKind::Sim,
        vcpus: 1,
        memory_mb: 256,
        disk_mb: 64,
        env: [("FROM".to_owned(), "template".to_owned())].into(),
        files: Vec::new(),
        steps: Vec::new(),
        start: None,
        ready: None,
        network: NetworkPolicy::default(),
        tools: Vec::new(),
    }
}

impl Rig {
    pub(crate) async fn new(config: SimConfig) -> Self {
        let dir = TempDir::new().unwrap();
        let queue = SqliteQueue::open(&dir.path().join("queue.db")).await.unwrap();
        Self::on(Arc::new(queue), dir, config, |_| {}).await
    }

    /// On this queue, and with a worker that is set up otherwise.
    pub(crate) async fn on(
        queue: Arc<dyn Queue>,
        dir: TempDir,
        config: SimConfig,
        change: impl FnOnce(&mut WorkerConfig),
    ) -> Self {
        let host = SimHost::new(config);
        let store = SqliteStore::open(&dir.path().join("store.db"), Durability::Process).await;
        let open = |name| Arc::new(SnapshotStore::open(dir.path().join(name)).unwrap());
        let mut config = WorkerConfig {
            pools: Vec::new(),
            stop_grace: Duration::from_secs(2),
            guest_limit: Duration::from_secs(2),
            template_rest: Duration::ZERO,
            ..WorkerConfig::default()
        };
        change(&mut config);
        let parts = WorkerParts {
            id: WorkerId::new(),
            store: Arc::new(store.unwrap()),
            queue,
            bus: Arc::new(LocalBus::new()),
            logs: aether_logs::LogSink::unconnected().0,
            sessions: Sessions::default(),
            drivers: vec![Arc::new(SimDriver::new(Arc::clone(&host))) as Arc<dyn Driver>],
            images: Arc::new(AnyImage),
            snapshots: open("snapshots"),
            templates: open("templates"),
            tools: Tools::open(ToolsConfig::new(dir.path().join("tools"))).unwrap(),
            config,
        };
        let mut rig = Self { host, parts, worker: None, dir };
        rig.start().await;
        rig
    }

    /// Another worker, on a host and in a folder of its own, with this one's store, queue and bus.
    pub(crate) async fn another(&self, config: SimConfig) -> Self {
        let dir = TempDir::new().unwrap();
        let host = SimHost::new(config);
        let parts = WorkerParts {
            id: WorkerId::new(),
            drivers: vec![Arc::new(SimDriver::new(Arc::clone(&host))) as Arc<dyn Driver>],
            tools: Tools::open(ToolsConfig::new(dir.path().join("tools"))).unwrap(),
            ..self.parts.clone()
        };
        let mut rig = Self { host, parts, worker: None, dir };
        rig.start().await;
        rig
    }

    pub(crate) async fn start(&mut self) {
        // As a new process does: what the one before left half done is swept.
        let open = |name| Arc::new(SnapshotStore::open(self.dir.path().join(name)).unwrap());
        (self.parts.snapshots, self.parts.templates) = (open("snapshots"), open("templates"));
        self.worker = Some(Worker::start(self.parts.clone()).await.unwrap());
    }

    /// The worker stops where it stands; the host goes on.
    pub(crate) async fn crash(&mut self) {
        self.worker.take().unwrap().abandon().await;
        // A commit that was on its way is carried out by the store's own thread, which a process
        // that dies takes with it. This comes after it.
        let none = self.store().cancel_task(TaskId::new()).await;
        assert!(none.is_err());
    }

    pub(crate) async fn shut_down(&mut self, mode: ShutdownMode) {
        let worker = self.worker.take().unwrap();
        let report = worker.shutdown(mode, Duration::from_secs(10)).await;
        assert_eq!(report.tasks_left, 0);
    }

    pub(crate) fn store(&self) -> &dyn Store {
        &*self.parts.store
    }

    pub(crate) fn listen(&self) -> Box<dyn Subscription> {
        self.parts.bus.subscribe()
    }

    async fn enqueue(&self, task: &Task, vm: &Vm) {
        if vm.worker_id.is_none() && vm.state == VmState::Creating {
            // It waits for a worker, and is dispatched when it has one.
            return;
        }
        let lane = vm.worker_id.map_or(Lane::Shared, Lane::Worker);
        let entry = Entry { task: task.id, lane, priority: task.priority, delay: Duration::ZERO };
        self.parts.queue.enqueue(&[entry]).await.unwrap();
        self.store().confirm_dispatched(&[task.id]).await.unwrap();
    }

    pub(crate) async fn request_create(&self, name: &str) -> Task {
        self.request_create_from(name, Origin::Image).await
    }

    pub(crate) async fn request_create_from(&self, name: &str, origin: Origin) -> Task {
        let vm = NewVm { id: VmId::new(), name: name.to_owned(), spec: vm_spec(origin) };
        self.request_create_of(vm).await
    }

    pub(crate) async fn request_create_of(&self, vm: NewVm) -> Task {
        let task = new_task(TaskKind::VmCreate);
        let accepted = self.store().create_vm(vm, task, Capacity::default(), None).await.unwrap();
        self.enqueue(&accepted.task, &accepted.vm).await;
        accepted.task
    }

    pub(crate) async fn create_from(&self, name: &str, origin: Origin) -> Vm {
        let task = self.request_create_from(name, origin).await;
        let task = self.ended(task.id).await;
        assert_eq!(task.state, TaskState::Completed, "{task:?}");
        self.store().vm(task.vm_id.unwrap()).await.unwrap().unwrap()
    }

    pub(crate) async fn request_snapshot(&self, vm: VmId, kind: TaskKind) -> (Task, SnapshotId) {
        let purpose = match kind {
            TaskKind::VmSuspend => SnapshotPurpose::Memory,
            _ => SnapshotPurpose::User,
        };
        let new = NewSnapshot { id: SnapshotId::new(), name: None, purpose };
        let recorded = self.store().request_snapshot(vm, new, new_task(kind), None).await;
        let (accepted, snapshot) = recorded.unwrap();
        self.enqueue(&accepted.task, &accepted.vm).await;
        (accepted.task, snapshot.id)
    }

    pub(crate) async fn snapshot(&self, vm: VmId) -> Snapshot {
        let (task, id) = self.request_snapshot(vm, TaskKind::VmSnapshot).await;
        let task = self.ended(task.id).await;
        assert_eq!(task.state, TaskState::Completed, "{task:?}");
        self.store().snapshot(id).await.unwrap().unwrap()
    }

    pub(crate) async fn suspend(&self, vm: VmId) -> Vm {
        let (task, _) = self.request_snapshot(vm, TaskKind::VmSuspend).await;
        let task = self.ended(task.id).await;
        assert_eq!(task.state, TaskState::Completed, "{task:?}");
        self.in_state(vm, VmState::Stopped).await
    }

    /// Task of the snapshot, and of the clones.
    pub(crate) async fn request_fork(&self, vm: VmId, name: &str, count: usize) -> Vec<Task> {
        let snapshot =
            NewSnapshot { id: SnapshotId::new(), name: None, purpose: SnapshotPurpose::Fork };
        let clone = |n| {
            let (id, name) = (VmId::new(), format!("{name}-{n}"));
            let spec = vm_spec(Origin::Snapshot(snapshot.id));
            (NewVm { id, name, spec }, new_task(TaskKind::VmCreate))
        };
        let clones: Vec<_> = (0..count).map(clone).collect();
        let task = new_task(TaskKind::VmSnapshot);
        let capacity = Capacity::default();
        let forked = self.store().fork_vm(vm, snapshot, task, clones, capacity, None).await;
        let forked = forked.unwrap();
        // The clones first: they wait for the snapshot.
        for (vm, task) in &forked.clones {
            self.enqueue(task, vm).await;
        }
        self.enqueue(&forked.accepted.task, &forked.accepted.vm).await;
        let clones = forked.clones.into_iter().map(|(_, task)| task);
        std::iter::once(forked.accepted.task).chain(clones).collect()
    }

    pub(crate) async fn request_build(&self, name: &str, spec: TemplateSpec) -> Template {
        let (driver, image, tools) = (spec.driver, spec.image.clone(), spec.tools.clone());
        let (memory_mb, disk_mb) = (spec.memory_mb, spec.disk_mb);
        let template =
            NewTemplate { id: TemplateId::new(), name: name.into(), tag: "latest".into(), spec };
        let snapshot =
            NewSnapshot { id: SnapshotId::new(), name: None, purpose: SnapshotPurpose::Template };
        let builder = VmId::new();
        let vm = NewVm {
            id: builder,
            name: format!("builder-{builder}"),
            spec: VmSpec {
                driver,
                image,
                memory_mb,
                disk_mb,
                tools,
                ..vm_spec(Origin::Builder(template.id))
            },
        };
        let task = new_task(TaskKind::TemplateBuild);
        let recorded = self.store().build_template(template, snapshot, vm, task, None).await;
        let (accepted, template) = recorded.unwrap();
        self.enqueue(&accepted.task, &accepted.vm).await;
        template
    }

    /// The template at the end of its build, and its builder gone.
    pub(crate) async fn built(&self, template: &Template) -> Template {
        self.ended(template.task_id).await;
        self.in_state(template.builder_id, VmState::Deleted).await;
        self.store().template(template.id).await.unwrap().unwrap()
    }

    pub(crate) async fn build(&self, name: &str, spec: TemplateSpec) -> Template {
        let template = self.request_build(name, spec).await;
        let template = self.built(&template).await;
        assert_eq!(template.state, TemplateState::Ready, "{template:?}");
        template
    }

    /// Files in a store of snapshots, its key and its folders apart.
    pub(crate) fn files(&self, store: &str) -> Vec<PathBuf> {
        fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() { walk(&path, found) } else { found.push(path) }
            }
        }
        let mut found = Vec::new();
        for folder in ["drafts", "entries", "trash"] {
            let folder = self.dir.path().join(store).join(folder);
            if folder.is_dir() {
                walk(&folder, &mut found);
            }
        }
        found
    }

    /// Completes when no file of a snapshot is left.
    pub(crate) async fn no_files(&self, store: &str) {
        let gone = async {
            while !self.files(store).is_empty() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let limit = Duration::from_secs(20);
        let left = || self.files(store);
        tokio::time::timeout(limit, gone).await.unwrap_or_else(|_| panic!("left: {:?}", left()));
    }

    pub(crate) async fn request(&self, vm: VmId, kind: TaskKind) -> Task {
        let accepted = self.store().request_on_vm(vm, new_task(kind), None).await.unwrap();
        for task in &accepted.cancelled {
            let worker_id = task.worker_id;
            let event = Event::CancelRequested { task_id: task.id, worker_id };
            self.parts.bus.publish(event).await.unwrap();
        }
        self.enqueue(&accepted.task, &accepted.vm).await;
        accepted.task
    }

    pub(crate) async fn request_execution(&self, vm: VmId, spec: ExecutionSpec) -> Execution {
        self.request_execution_as(ExecutionId::new(), vm, spec).await
    }

    pub(crate) async fn request_execution_as(
        &self,
        id: ExecutionId,
        vm: VmId,
        spec: ExecutionSpec,
    ) -> Execution {
        let execution = NewExecution { id, spec };
        let task = new_task(TaskKind::VmExecute);
        let (accepted, execution) =
            self.store().request_execution(vm, execution, task, None).await.unwrap();
        self.enqueue(&accepted.task, &accepted.vm).await;
        execution
    }

    /// The task at its end.
    pub(crate) async fn ended(&self, id: TaskId) -> Task {
        let ended = async {
            let mut events = self.listen();
            loop {
                let task = self.store().task(id).await.unwrap().unwrap();
                if task.state.is_end() {
                    return task;
                }
                while !matches!(events.next().await,
                    Received::Event(Event::Task { task_id, .. }) if task_id == id)
                {}
            }
        };
        match tokio::time::timeout(LIMIT, ended).await {
            Ok(task) => task,
            Err(_) => self.stuck(format!("{:?}", self.store().task(id).await)).await,
        }
    }

    /// Completes when an attempt at the task has begun.
    pub(crate) async fn begun(&self, id: TaskId) {
        let mut events = self.listen();
        while self.store().task(id).await.unwrap().unwrap().attempts == 0 {
            while !matches!(events.next().await,
                Received::Event(Event::Task { task_id, .. }) if task_id == id)
            {}
        }
    }

    pub(crate) async fn in_state(&self, id: VmId, state: VmState) -> Vm {
        let there = async {
            let mut events = self.listen();
            loop {
                let vm = self.store().vm(id).await.unwrap().unwrap();
                if vm.state == state {
                    return vm;
                }
                while !matches!(events.next().await,
                    Received::Event(Event::Vm { vm_id, .. }) if vm_id == id)
                {}
            }
        };
        match tokio::time::timeout(LIMIT, there).await {
            Ok(vm) => vm,
            Err(_) => self.stuck(format!("{:?}", self.store().vm(id).await)).await,
        }
    }

    async fn stuck(&self, what: String) -> ! {
        let open = self.store().open_tasks().await;
        let depth = self.parts.queue.depth().await;
        let held = self.host.leftovers();
        panic!("never came: {what}; open {open:?}; queue {depth:?}; held {held:?}");
    }

    pub(crate) async fn execution_begun(&self, execution: &Execution) {
        let mut events = self.listen();
        while self.store().execution(execution.id).await.unwrap().unwrap().boot_id.is_none() {
            while !matches!(events.next().await,
                Received::Event(Event::ExecutionStarted { execution_id, .. })
                    if execution_id == execution.id)
            {}
        }
    }

    pub(crate) async fn create(&self, name: &str) -> VmId {
        let task = self.request_create(name).await;
        let task = self.ended(task.id).await;
        assert_eq!(task.state, TaskState::Completed, "{task:?}");
        task.vm_id.unwrap()
    }

    pub(crate) async fn execute(&self, vm: VmId, spec: ExecutionSpec) -> Execution {
        let execution = self.request_execution(vm, spec).await;
        self.execution_ended(&execution).await
    }

    pub(crate) async fn execution_ended(&self, execution: &Execution) -> Execution {
        self.ended(execution.task_id).await;
        self.store().execution(execution.id).await.unwrap().unwrap()
    }

    pub(crate) async fn stdout(&self, execution: &Execution) -> String {
        let kept = self.store().output(execution.id, OutputStream::Stdout).await.unwrap();
        String::from_utf8([kept.head, kept.tail].concat()).unwrap()
    }

    /// Nothing is left: no machine, no claim, no task without an end.
    pub(crate) async fn assert_clean(&self) {
        assert_eq!(self.host.leftovers(), Vec::<String>::new());
        assert_eq!(self.store().open_tasks().await.unwrap(), Vec::new());
    }
}
