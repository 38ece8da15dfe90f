use std::{collections::BTreeMap, net::IpAddr};

use aether_types::{
    DriverKind, Fault, NetworkPolicy, StateChange, Timestamp, Vm, VmId, VmState, WorkerId,
};
use serde::{Deserialize, Serialize};

/// `POST /vms`. Everything has a default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CreateVm {
    /// Unique among VMs that are not deleted; made from the id where it is not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mb: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_mb: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<DriverKind>,
    /// Given to every command in the VM. Values are never shown again.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Time to live from creation; the VM is deleted when it is over.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout_s: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkPolicy>,
}

/// A VM as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmView {
    pub id: VmId,
    pub name: String,
    pub state: VmState,
    /// Why it is in this state, where it is more than a request being carried out.
    pub reason: Option<Fault>,
    pub driver: DriverKind,
    /// How strong the wall around the VM is, in words; weaker forms say so.
    pub isolation: Option<String>,
    pub vcpus: u32,
    pub memory_mb: u32,
    pub disk_mb: u32,
    pub image: String,
    /// Names only.
    pub env: Vec<String>,
    pub labels: BTreeMap<String, String>,
    pub network: NetworkPolicy,
    pub address: Option<IpAddr>,
    pub worker_id: Option<WorkerId>,
    pub timeout_s: Option<u64>,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub expires_at: Option<Timestamp>,
    /// Every change of state, oldest first. Only in the answer about one VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub history: Option<Vec<StateChange>>,
}

impl VmView {
    #[must_use]
    pub fn new(vm: Vm, isolation: Option<String>, history: Option<Vec<StateChange>>) -> Self {
        let Vm {
            id,
            name,
            state,
            reason,
            spec,
            worker_id,
            address,
            created_at,
            updated_at,
            expires_at,
            generation: _,
        } = vm;
        Self {
            id,
            name,
            state,
            reason,
            driver: spec.driver,
            isolation,
            vcpus: spec.vcpus,
            memory_mb: spec.memory_mb,
            disk_mb: spec.disk_mb,
            image: spec.image,
            env: spec.env.into_keys().collect(),
            labels: spec.labels,
            network: spec.network,
            address,
            worker_id,
            timeout_s: spec.timeout_s,
            created_at,
            updated_at,
            expires_at,
            history,
        }
    }
}
