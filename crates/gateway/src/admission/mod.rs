//! From what a client asked for to a complete specification, or the reason why not.

mod names;
mod template;
mod tools;

use std::collections::BTreeMap;

use aether_api::{CreateVm, ForkVm};
use aether_store::NewVm;
use aether_types::{
    DriverKind, ErrorCode, Origin, Snapshot, SnapshotId, Template, ToolRequest, Vm, VmId, VmSpec,
    limits::{DISK_MB_DEFAULT, FORK_COUNT_MAX, MEMORY_MB_DEFAULT, VCPUS_DEFAULT},
    template::NO_TEMPLATE,
    vm::validate_name,
};

pub(crate) use names::{TemplateName, project_name, snapshot_name};
pub(crate) use template::admit_template;
pub(crate) use tools::{AskedTools, admit_tools, default_tools};

use crate::{
    Catalogue, HostLimits, ToolCatalogue,
    problem::{ApiError, ApiResult},
};

/// What a new VM begins as, found in the store.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source<'a> {
    Image,
    Template(&'a Template),
    Snapshot {
        snapshot: &'a Snapshot,
        /// Of the VM that it was taken of.
        tools: &'a [ToolRequest],
    },
}

/// What this installation offers.
#[derive(Clone, Copy)]
pub(crate) struct Offer<'a> {
    pub(crate) catalogue: &'a dyn Catalogue,
    pub(crate) tools: &'a dyn ToolCatalogue,
}

/// Refuses two origins at once.
pub(crate) fn check_origin(request: &CreateVm) -> ApiResult<()> {
    let refuse = |field: &str, other: &str| {
        Err(ApiError::invalid(format!("{field}: not together with {other}")))
    };
    let CreateVm { template, snapshot, image, default_tools, .. } = request;
    let template = template.as_deref().filter(|name| *name != NO_TEMPLATE);
    if default_tools.is_some() {
        // What they have is mounted before anyone asks.
        match (template, snapshot) {
            (Some(_), _) => {
                return refuse("default_tools", "template, which has the tools that it has");
            }
            (None, Some(_)) => {
                return refuse("default_tools", "snapshot, which has the tools that it has");
            }
            (None, None) => {}
        }
    }
    match (template.is_some(), snapshot.is_some(), image.is_some()) {
        (true, true, _) => refuse("snapshot", "template"),
        (true, false, true) => refuse("image", "template"),
        (false, true, true) => refuse("image", "snapshot"),
        (_, _, _) => Ok(()),
    }
}

/// The VM's name and specification.
pub(crate) fn admit(
    request: CreateVm,
    id: VmId,
    source: Source<'_>,
    offer: Offer<'_>,
) -> ApiResult<(String, VmSpec)> {
    let catalogue = offer.catalogue;
    if let Source::Snapshot { snapshot, .. } = source {
        check_snapshot(&request, snapshot)?;
    }
    if let Source::Template(template) = source {
        check_template(&request, template)?;
    }
    let CreateVm {
        name,
        template: _,
        snapshot: _,
        vcpus,
        memory_mb,
        disk_mb,
        image,
        driver,
        env,
        labels,
        timeout_s,
        network,
        tools,
        additional_tools,
        tool_versions,
        default_tools: wants_defaults,
        placement,
    } = request;
    let name = name.unwrap_or_else(|| name_of(id));
    validate_name(&name).map_err(ApiError::invalid)?;
    let base = match source {
        Source::Image => VmSpec {
            vcpus: VCPUS_DEFAULT,
            memory_mb: MEMORY_MB_DEFAULT,
            disk_mb: DISK_MB_DEFAULT,
            image: image.unwrap_or_else(|| catalogue.default_image()),
            driver: catalogue.default_driver(),
            tools: default_tools(wants_defaults, offer.tools),
            ..empty()
        },
        Source::Template(template) => VmSpec {
            vcpus: template.spec.vcpus,
            memory_mb: template.spec.memory_mb,
            disk_mb: template.spec.disk_mb,
            image: template.spec.image.clone(),
            driver: template.spec.driver,
            env: template.spec.env.clone(),
            origin: Origin::Template(template.id),
            tools: template.spec.tools.clone(),
            ..empty()
        },
        Source::Snapshot { snapshot, tools } => VmSpec {
            vcpus: snapshot.vcpus,
            memory_mb: snapshot.memory_mb,
            disk_mb: snapshot.disk_mb,
            image: snapshot.image.clone(),
            driver: snapshot.driver,
            origin: Origin::Snapshot(snapshot.id),
            tools: tools.to_vec(),
            ..empty()
        },
    };
    let asked =
        AskedTools { tools: &tools, additional: &additional_tools, versions: &tool_versions };
    let spec = VmSpec {
        vcpus: vcpus.unwrap_or(base.vcpus),
        memory_mb: memory_mb.unwrap_or(base.memory_mb),
        disk_mb: disk_mb.unwrap_or(base.disk_mb),
        image: base.image,
        driver: driver.unwrap_or(base.driver),
        env: over(base.env, env),
        labels,
        timeout_s,
        network: network.unwrap_or_default(),
        origin: base.origin,
        tools: admit_tools(asked, &base.tools, offer.tools)?,
        placement: placement.unwrap_or_default(),
    };
    check(&spec, catalogue)?;
    Ok((name, spec))
}

/// What can be said of a specification at once, by the rules and by what there is here.
fn check(spec: &VmSpec, catalogue: &dyn Catalogue) -> ApiResult<()> {
    spec.validate().map_err(ApiError::invalid)?;
    check_driver(spec.driver, catalogue)?;
    match spec.origin {
        Origin::Image | Origin::Builder(_) => check_image(&spec.image, catalogue)?,
        // They have what they need of their image, which may have another name by now.
        Origin::Template(_) | Origin::Snapshot(_) => {}
    }
    check_host(spec, catalogue.host_limits())
}

fn empty() -> VmSpec {
    VmSpec {
        vcpus: 0,
        memory_mb: 0,
        disk_mb: 0,
        image: String::new(),
        driver: DriverKind::Sim,
        env: BTreeMap::new(),
        labels: BTreeMap::new(),
        timeout_s: None,
        network: aether_types::NetworkPolicy::default(),
        origin: Origin::Image,
        tools: Vec::new(),
        placement: aether_types::Placement::default(),
    }
}

fn over(
    mut under: BTreeMap<String, String>,
    env: BTreeMap<String, String>,
) -> BTreeMap<String, String> {
    under.extend(env);
    under
}

/// A VM that was to boot an image, as a beginning from the template, where it would be the same VM.
pub(crate) fn begin_as(spec: &VmSpec, template: &Template) -> Option<VmSpec> {
    let of = &template.spec;
    let same = spec.image == of.image
        && spec.driver == of.driver
        && spec.vcpus == of.vcpus
        && spec.memory_mb == of.memory_mb
        && spec.disk_mb == of.disk_mb
        && has_all(&spec.tools, &of.tools);
    let begun = same.then(|| VmSpec {
        origin: Origin::Template(template.id),
        env: over(of.env.clone(), spec.env.clone()),
        ..spec.clone()
    });
    // With the template's, the environment may have become too large.
    begun.filter(|spec| spec.validate().is_ok())
}

/// Another version of a tool goes over the template's; a tool of the template cannot go.
fn has_all(tools: &[ToolRequest], of: &[ToolRequest]) -> bool {
    of.iter().all(|needed| tools.iter().any(|tool| tool.name == needed.name))
}

/// A memory fits the machine that it was taken of, and no other.
fn check_snapshot(request: &CreateVm, snapshot: &Snapshot) -> ApiResult<()> {
    same("vcpus", request.vcpus, snapshot.vcpus, "snapshot")?;
    same("memory_mb", request.memory_mb, snapshot.memory_mb, "snapshot")?;
    same("disk_mb", request.disk_mb, snapshot.disk_mb, "snapshot")?;
    same("driver", request.driver, snapshot.driver, "snapshot")
}

/// With other processors or memory the VM boots on the template's disk; the disk is what it is.
fn check_template(request: &CreateVm, template: &Template) -> ApiResult<()> {
    same("disk_mb", request.disk_mb, template.spec.disk_mb, "template")?;
    same("driver", request.driver, template.spec.driver, "template")
}

fn same<T: Copy + PartialEq + std::fmt::Display>(
    field: &str,
    asked: Option<T>,
    has: T,
    what: &str,
) -> ApiResult<()> {
    match asked {
        Some(asked) if asked != has => Err(ApiError::invalid(format!(
            "{field}: {asked} is asked for, and the {what} has {has}; leave it out to get that"
        ))),
        Some(_) | None => Ok(()),
    }
}

/// The clones of a fork.
pub(crate) fn admit_fork(
    request: ForkVm,
    source: &Vm,
    snapshot: SnapshotId,
    catalogue: &dyn Catalogue,
) -> ApiResult<Vec<NewVm>> {
    let ForkVm { count, name_prefix, env, labels, timeout_s, network } = request;
    let count = count.unwrap_or(1);
    if !(1..=FORK_COUNT_MAX).contains(&count) {
        let text = format!("count: {count} is outside 1 to {FORK_COUNT_MAX}");
        return Err(ApiError::invalid(text));
    }
    let of = source.spec.clone();
    let spec = VmSpec {
        env: env.unwrap_or(of.env),
        labels: labels.unwrap_or(of.labels),
        timeout_s: timeout_s.or(of.timeout_s),
        network: network.unwrap_or(of.network),
        origin: Origin::Snapshot(snapshot),
        ..of
    };
    check(&spec, catalogue)?;
    check_snapshots(spec.driver, catalogue)?;
    let named = |n: u32| {
        let id = VmId::new();
        let name = match &name_prefix {
            Some(prefix) => format!("{prefix}-{n}"),
            None => name_of(id),
        };
        validate_name(&name).map_err(|text| {
            let text = text.trim_start_matches("name: ");
            ApiError::invalid(format!("name_prefix: with its number, {text}"))
        })?;
        Ok(NewVm { id, name, spec: spec.clone() })
    };
    (1..=count).map(named).collect()
}

/// The last group of an id is random; two VMs of one moment differ in it.
fn name_of(id: VmId) -> String {
    let text = id.to_string();
    format!("vm-{}", text.rsplit('-').next().unwrap_or(&text))
}

fn check_driver(kind: DriverKind, catalogue: &dyn Catalogue) -> ApiResult<()> {
    let drivers = catalogue.drivers();
    let detail = if let Some(driver) = drivers.iter().find(|driver| driver.kind == kind) {
        let Some(reason) = &driver.unavailable else { return Ok(()) };
        format!("driver: {kind} does not work here: {reason}")
    } else {
        let known: Vec<_> = drivers.iter().map(|d| d.kind.as_str()).collect();
        format!("driver: {kind} is not configured; one of {}", known.join(", "))
    };
    Err(ApiError::new(ErrorCode::DriverUnavailable, detail).field("driver"))
}

/// What needs a snapshot is refused at once where the driver takes none.
pub(crate) fn check_snapshots(kind: DriverKind, catalogue: &dyn Catalogue) -> ApiResult<()> {
    if catalogue.drivers().iter().any(|driver| driver.kind == kind && driver.takes_snapshots) {
        return Ok(());
    }
    let detail = format!("driver: {kind} takes no snapshots here");
    Err(ApiError::new(ErrorCode::DriverUnavailable, detail).field("driver"))
}

fn check_image(image: &str, catalogue: &dyn Catalogue) -> ApiResult<()> {
    let images = catalogue.images();
    if images.iter().any(|known| known == image) {
        return Ok(());
    }
    let detail = format!("image: there is no `{image}`; one of {}", images.join(", "));
    Err(ApiError::new(ErrorCode::ImageNotFound, detail).field("image"))
}

fn check_host(spec: &VmSpec, host: HostLimits) -> ApiResult<()> {
    for (field, asked, most) in [
        ("vcpus", spec.vcpus, host.vcpus_max),
        ("memory_mb", spec.memory_mb, host.memory_mb_max),
        ("disk_mb", spec.disk_mb, host.disk_mb_max),
    ] {
        if asked > most {
            let detail = format!("{field}: {asked} is more than this host can give, {most}");
            return Err(ApiError::new(ErrorCode::InsufficientCapacity, detail).field(field));
        }
    }
    Ok(())
}
