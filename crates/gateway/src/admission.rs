//! From what a client asked for to a complete specification, or the reason why not.

use aether_api::CreateVm;
use aether_types::{
    DriverKind, ErrorCode, VmId, VmSpec,
    limits::{DISK_MB_DEFAULT, MEMORY_MB_DEFAULT, VCPUS_DEFAULT},
    vm::validate_name,
};

use crate::{
    Catalogue, HostLimits,
    problem::{ApiError, ApiResult},
};

/// The VM's name and specification.
pub(crate) fn admit(
    request: CreateVm,
    id: VmId,
    catalogue: &dyn Catalogue,
) -> ApiResult<(String, VmSpec)> {
    let CreateVm {
        name,
        vcpus,
        memory_mb,
        disk_mb,
        image,
        driver,
        env,
        labels,
        timeout_s,
        network,
    } = request;
    let name = name.unwrap_or_else(|| name_of(id));
    validate_name(&name).map_err(ApiError::invalid)?;
    let spec = VmSpec {
        vcpus: vcpus.unwrap_or(VCPUS_DEFAULT),
        memory_mb: memory_mb.unwrap_or(MEMORY_MB_DEFAULT),
        disk_mb: disk_mb.unwrap_or(DISK_MB_DEFAULT),
        image: image.unwrap_or_else(|| catalogue.default_image()),
        driver: driver.unwrap_or_else(|| catalogue.default_driver()),
        env,
        labels,
        timeout_s,
        network: network.unwrap_or_default(),
    };
    spec.validate().map_err(ApiError::invalid)?;
    check_driver(spec.driver, catalogue)?;
    check_image(&spec.image, catalogue)?;
    check_host(&spec, catalogue.host_limits())?;
    Ok((name, spec))
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
