//! Rows to nouns and back. Columns are read by position, so each list of columns stands beside
//! its reader.

use std::str::FromStr;

use super::query::{Column, Row};
use crate::{Cursor, StoreError};
use aether_types::{
    Execution, ExecutionState, ExitStatus, Fault, OutputStream, Priority, Snapshot, Standing,
    StateChange, Task, Template, Timestamp, Vm, VmSpec, VmTool, Worker,
};

macro_rules! vm_columns {
    () => {
        "id, name, state, reason_code, reason_message, spec, worker_id, address, created_at, \
         updated_at, expires_at, generation, start, memory, tools, project_id"
    };
}

macro_rules! task_columns {
    () => {
        "id, kind, state, priority, vm_id, execution_id, attempts, max_attempts, worker_id, epoch, \
         cancel_requested, created_at, started_at, finished_at, error_code, error_message, \
         snapshot_id, tools, progress, project_id"
    };
}

macro_rules! execution_columns {
    () => {
        "id, vm_id, task_id, spec, state, boot_id, exit_code, exit_signal, error_code, \
         error_message, created_at, started_at, finished_at, duration_us, project_id"
    };
}

macro_rules! snapshot_columns {
    () => {
        "id, name, purpose, state, reason_code, reason_message, vm_id, worker_id, driver, image, \
         vcpus, memory_mb, disk_mb, size_bytes, digest, paused_us, created_at, updated_at, \
         project_id"
    };
}

macro_rules! template_columns {
    () => {
        "id, name, tag, state, reason_code, reason_message, spec, digest, snapshot_id, builder_id, \
         task_id, progress, size_bytes, created_at, updated_at, generation, project_id"
    };
}

macro_rules! worker_columns {
    () => {
        "id, host, zone, labels, drivers, capacity, template_folder, version, presence, draining, \
         epoch, registered_at, heartbeat_at, lease_ms, stream_address"
    };
}

pub(super) use {
    execution_columns, snapshot_columns, task_columns, template_columns, vm_columns, worker_columns,
};

pub(super) fn vm(row: &Row) -> Result<Vm, StoreError> {
    let r = Reader { row, noun: "VM" };
    let spec: VmSpec = r.json(5)?;
    let got: Option<Vec<VmTool>> = r.json_option(14)?;
    Ok(Vm {
        id: r.parsed(0)?,
        project_id: r.parsed(15)?,
        name: r.get(1)?,
        state: r.parsed(2)?,
        reason: r.fault(3, 4)?,
        tools: got.unwrap_or_else(|| spec.tools.iter().map(VmTool::asked).collect()),
        spec,
        worker_id: r.parsed_option(6)?,
        address: r.parsed_option(7)?,
        created_at: r.time(8)?,
        updated_at: r.time(9)?,
        expires_at: r.time_option(10)?,
        start: r.json_option(12)?,
        memory: r.parsed_option(13)?,
        generation: r.get(11)?,
    })
}

pub(super) fn task(row: &Row) -> Result<Task, StoreError> {
    let r = Reader { row, noun: "task" };
    Ok(Task {
        id: r.parsed(0)?,
        project_id: r.parsed(19)?,
        kind: r.parsed(1)?,
        state: r.parsed(2)?,
        priority: r.parsed::<Priority>(3)?,
        vm_id: r.parsed_option(4)?,
        execution_id: r.parsed_option(5)?,
        snapshot_id: r.parsed_option(16)?,
        attempts: r.unsigned(6)?,
        max_attempts: r.unsigned(7)?,
        worker_id: r.parsed_option(8)?,
        epoch: r.get(9)?,
        cancel_requested: r.get::<i64>(10)? != 0,
        created_at: r.time(11)?,
        started_at: r.time_option(12)?,
        finished_at: r.time_option(13)?,
        error: r.fault(14, 15)?,
        tools: r.json_option(17)?.unwrap_or_default(),
        progress: r.json_option(18)?,
    })
}

pub(super) fn execution(row: &Row) -> Result<Execution, StoreError> {
    let r = Reader { row, noun: "execution" };
    let state: &str = r.get(4)?;
    let state = ExecutionState::ALL.iter().find(|s| s.as_str() == state);
    let exit = match (r.signed_option(6)?, r.signed_option(7)?) {
        (Some(code), _) => Some(ExitStatus::Code(code)),
        (None, Some(signal)) => Some(ExitStatus::Signal(signal)),
        (None, None) => None,
    };
    Ok(Execution {
        id: r.parsed(0)?,
        project_id: r.parsed(14)?,
        vm_id: r.parsed(1)?,
        task_id: r.parsed(2)?,
        spec: r.json(3)?,
        state: *state.ok_or_else(|| r.corrupt())?,
        boot_id: r.get(5)?,
        exit,
        error: r.fault(8, 9)?,
        created_at: r.time(10)?,
        started_at: r.time_option(11)?,
        finished_at: r.time_option(12)?,
        duration_us: r.size_option(13)?,
    })
}

pub(super) fn snapshot(row: &Row) -> Result<Snapshot, StoreError> {
    let r = Reader { row, noun: "snapshot" };
    Ok(Snapshot {
        id: r.parsed(0)?,
        project_id: r.parsed(18)?,
        name: r.get(1)?,
        purpose: r.parsed(2)?,
        state: r.parsed(3)?,
        reason: r.fault(4, 5)?,
        vm_id: r.parsed(6)?,
        worker_id: r.parsed_option(7)?,
        driver: r.parsed(8)?,
        image: r.get(9)?,
        vcpus: r.unsigned(10)?,
        memory_mb: r.unsigned(11)?,
        disk_mb: r.unsigned(12)?,
        size_bytes: r.size_option(13)?,
        digest: r.get(14)?,
        paused_us: r.size_option(15)?,
        created_at: r.time(16)?,
        updated_at: r.time(17)?,
    })
}

pub(super) fn template(row: &Row) -> Result<Template, StoreError> {
    let r = Reader { row, noun: "template" };
    Ok(Template {
        id: r.parsed(0)?,
        project_id: r.parsed(16)?,
        name: r.get(1)?,
        tag: r.get(2)?,
        state: r.parsed(3)?,
        reason: r.fault(4, 5)?,
        spec: r.json(6)?,
        digest: r.get(7)?,
        snapshot_id: r.parsed(8)?,
        builder_id: r.parsed(9)?,
        task_id: r.parsed(10)?,
        progress: r.json(11)?,
        size_bytes: r.size_option(12)?,
        created_at: r.time(13)?,
        updated_at: r.time(14)?,
        generation: r.get(15)?,
    })
}

/// How many columns a worker has; what is asked for with it comes after them.
pub(super) const WORKER_COLUMNS: usize = 15;

pub(super) fn worker(row: &Row) -> Result<Worker, StoreError> {
    let r = Reader { row, noun: "worker" };
    Ok(Worker {
        id: r.parsed(0)?,
        host: r.get(1)?,
        zone: r.get(2)?,
        labels: r.json(3)?,
        drivers: r.json(4)?,
        capacity: r.json(5)?,
        template_folder: r.get(6)?,
        version: r.get(7)?,
        standing: Standing { presence: r.parsed(8)?, draining: r.get::<i64>(9)? != 0 },
        epoch: r.get(10)?,
        registered_at: r.time(11)?,
        heartbeat_at: r.time(12)?,
        lease_ms: r.get(13)?,
        stream_address: r.get(14)?,
    })
}

/// Columns: state, at, reason_code, reason_message.
pub(super) fn change(row: &Row) -> Result<StateChange, StoreError> {
    let r = Reader { row, noun: "change of a VM" };
    Ok(StateChange { state: r.parsed(0)?, at: r.time(1)?, reason: r.fault(2, 3)? })
}

pub(super) fn vm_position(vm: &Vm) -> Option<Cursor> {
    Cursor::new(vm.created_at.unix_ms(), &vm.id.to_string())
}

pub(super) fn task_position(task: &Task) -> Option<Cursor> {
    Cursor::new(task.created_at.unix_ms(), &task.id.to_string())
}

pub(super) fn execution_position(execution: &Execution) -> Option<Cursor> {
    Cursor::new(execution.created_at.unix_ms(), &execution.id.to_string())
}

pub(super) fn snapshot_position(snapshot: &Snapshot) -> Option<Cursor> {
    Cursor::new(snapshot.created_at.unix_ms(), &snapshot.id.to_string())
}

pub(super) fn template_position(template: &Template) -> Option<Cursor> {
    Cursor::new(template.created_at.unix_ms(), &template.id.to_string())
}

pub(super) fn stream_name(stream: OutputStream) -> &'static str {
    match stream {
        OutputStream::Stdout => "stdout",
        OutputStream::Stderr => "stderr",
    }
}

/// The two columns of a fault.
pub(super) fn fault_columns(fault: Option<&Fault>) -> (Option<&'static str>, Option<String>) {
    fault.map_or((None, None), |f| (Some(f.code.as_str()), Some(f.message.clone())))
}

/// A specification or a report as it is stored.
pub(super) fn json<T: serde::Serialize>(
    value: &T,
    noun: &'static str,
) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(|_| StoreError::Corrupt(noun))
}

/// The databases' integers are signed.
pub(super) fn size_column(size: u64) -> i64 {
    i64::try_from(size).unwrap_or(i64::MAX)
}

/// Every row of an answer.
pub(super) fn all<T>(
    rows: &[Row],
    read: impl Fn(&Row) -> Result<T, StoreError>,
) -> Result<Vec<T>, StoreError> {
    rows.iter().map(read).collect()
}

pub(super) struct Reader<'r> {
    pub(super) row: &'r Row,
    pub(super) noun: &'static str,
}

impl<'r> Reader<'r> {
    pub(super) fn corrupt(&self) -> StoreError {
        StoreError::Corrupt(self.noun)
    }

    pub(super) fn get<T: Column<'r>>(&self, column: usize) -> Result<T, StoreError> {
        self.row.get(column).map_err(|_| self.corrupt())
    }

    pub(super) fn parsed<T: FromStr>(&self, column: usize) -> Result<T, StoreError> {
        self.get::<&str>(column)?.parse().map_err(|_| self.corrupt())
    }

    pub(super) fn parsed_option<T: FromStr>(&self, column: usize) -> Result<Option<T>, StoreError> {
        let text = self.get::<Option<&str>>(column)?;
        text.map(str::parse).transpose().map_err(|_| self.corrupt())
    }

    pub(super) fn json<T: serde::de::DeserializeOwned>(
        &self,
        column: usize,
    ) -> Result<T, StoreError> {
        serde_json::from_str(self.get(column)?).map_err(|_| self.corrupt())
    }

    fn json_option<T: serde::de::DeserializeOwned>(
        &self,
        column: usize,
    ) -> Result<Option<T>, StoreError> {
        let text = self.get::<Option<&str>>(column)?;
        text.map(serde_json::from_str).transpose().map_err(|_| self.corrupt())
    }

    fn size_option(&self, column: usize) -> Result<Option<u64>, StoreError> {
        let size = self.get::<Option<i64>>(column)?;
        size.map(u64::try_from).transpose().map_err(|_| self.corrupt())
    }

    fn signed_option(&self, column: usize) -> Result<Option<i32>, StoreError> {
        let number = self.get::<Option<i64>>(column)?;
        number.map(i32::try_from).transpose().map_err(|_| self.corrupt())
    }

    pub(super) fn unsigned(&self, column: usize) -> Result<u32, StoreError> {
        u32::try_from(self.get::<i64>(column)?).map_err(|_| self.corrupt())
    }

    pub(super) fn number(&self, column: usize) -> Result<i64, StoreError> {
        self.get(column)
    }

    pub(super) fn time(&self, column: usize) -> Result<Timestamp, StoreError> {
        self.get(column).map(Timestamp::from_unix_ms)
    }

    pub(super) fn time_option(&self, column: usize) -> Result<Option<Timestamp>, StoreError> {
        Ok(self.get::<Option<i64>>(column)?.map(Timestamp::from_unix_ms))
    }

    fn fault(&self, code: usize, message: usize) -> Result<Option<Fault>, StoreError> {
        let Some(code) = self.get::<Option<&str>>(code)? else { return Ok(None) };
        let code = code.parse().map_err(|_| self.corrupt())?;
        Ok(Some(Fault { code, message: self.get::<Option<String>>(message)?.unwrap_or_default() }))
    }
}
