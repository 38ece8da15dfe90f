//! What a template is built from.

use aether_api::BuildTemplate;
use aether_store::{NewTemplate, NewVm};
use aether_types::{
    Origin, Placement, TemplateFile, TemplateId, TemplateReady, TemplateSpec, TemplateStep, VmId,
    VmSpec,
    limits::{
        ARG_BYTES_MAX, DISK_MB_DEFAULT, MEMORY_MB_DEFAULT, PATH_BYTES_MAX,
        TEMPLATE_BUILD_TIMEOUT_S, TEMPLATE_FILES_BYTES_MAX, TEMPLATE_FILES_MAX,
        TEMPLATE_STEP_TIMEOUT_S_MAX, TEMPLATE_STEPS_MAX, VCPUS_DEFAULT,
    },
};

use super::{AskedTools, Offer, TemplateName, admit_tools, check, check_snapshots, default_tools};
use crate::problem::{ApiError, ApiResult};

/// The template, and the VM in which it is built.
pub(crate) fn admit_template(
    request: BuildTemplate,
    offer: Offer<'_>,
) -> ApiResult<(NewTemplate, NewVm)> {
    let BuildTemplate {
        name,
        tag,
        image,
        driver,
        vcpus,
        memory_mb,
        disk_mb,
        start,
        env,
        ready,
        network,
        files,
        steps,
        tools,
        default_tools: wants_defaults,
    } = request;
    let catalogue = offer.catalogue;
    let defaults = default_tools(wants_defaults, offer.tools);
    let TemplateName { name, tag } = TemplateName::new(name, tag)?;
    let spec = TemplateSpec {
        image: image.unwrap_or_else(|| catalogue.default_image()),
        driver: driver.unwrap_or_else(|| catalogue.default_driver()),
        vcpus: vcpus.unwrap_or(VCPUS_DEFAULT),
        memory_mb: memory_mb.unwrap_or(MEMORY_MB_DEFAULT),
        disk_mb: disk_mb.unwrap_or(DISK_MB_DEFAULT),
        env,
        files,
        steps,
        start,
        ready,
        network: network.unwrap_or_default(),
        tools: admit_tools(AskedTools::of(&tools), &defaults, offer.tools)?,
    };
    validate(&spec).map_err(ApiError::invalid)?;
    let template = NewTemplate { id: TemplateId::new(), name, tag, spec };
    let builder = builder(&template);
    check(&builder.spec, catalogue)?;
    check_snapshots(builder.spec.driver, catalogue)?;
    Ok((template, builder))
}

/// Nobody can know its name before it has it, so that it cannot clash. It goes with the build, and
/// at the latest when a build must be over.
fn builder(template: &NewTemplate) -> NewVm {
    let id = VmId::new();
    let spec = &template.spec;
    let spec = VmSpec {
        vcpus: spec.vcpus,
        memory_mb: spec.memory_mb,
        disk_mb: spec.disk_mb,
        image: spec.image.clone(),
        driver: spec.driver,
        env: spec.env.clone(),
        labels: std::collections::BTreeMap::new(),
        timeout_s: Some(TEMPLATE_BUILD_TIMEOUT_S),
        network: spec.network.clone(),
        origin: Origin::Builder(template.id),
        tools: spec.tools.clone(),
        placement: Placement::default(),
    };
    NewVm { id, name: format!("build-{}", id.to_string().replace('-', "")), spec }
}

/// What the specification of its VM does not have; the error names the field.
fn validate(spec: &TemplateSpec) -> Result<(), String> {
    validate_files(&spec.files)?;
    if spec.steps.len() > TEMPLATE_STEPS_MAX {
        return Err(format!("steps: at most {TEMPLATE_STEPS_MAX}"));
    }
    for (n, TemplateStep { run, timeout_s }) in spec.steps.iter().enumerate() {
        shell(&format!("steps[{n}].run"), run)?;
        limit(&format!("steps[{n}].timeout_s"), *timeout_s)?;
    }
    if let Some(start) = &spec.start {
        shell("start", start)?;
    }
    if let Some(TemplateReady { command, timeout_s }) = &spec.ready {
        shell("ready.command", command)?;
        limit("ready.timeout_s", *timeout_s)?;
    }
    Ok(())
}

fn validate_files(files: &[TemplateFile]) -> Result<(), String> {
    if files.len() > TEMPLATE_FILES_MAX {
        return Err(format!("files: at most {TEMPLATE_FILES_MAX}"));
    }
    let total: usize = files.iter().map(|file| file.content.len()).sum();
    if total > TEMPLATE_FILES_BYTES_MAX {
        return Err(format!("files: {total} bytes in all, at most {TEMPLATE_FILES_BYTES_MAX}"));
    }
    for (n, file) in files.iter().enumerate() {
        let path = &file.path;
        let plain = path.len() <= PATH_BYTES_MAX && !path.contains('\0') && !path.ends_with('/');
        if !path.starts_with('/') || !plain {
            return Err(format!(
                "files[{n}].path: an absolute path of at most {PATH_BYTES_MAX} bytes is needed"
            ));
        }
        if file.mode > 0o7777 {
            return Err(format!("files[{n}].mode: permission bits are needed, such as 420 (0644)"));
        }
    }
    Ok(())
}

/// It is one argument of a shell.
fn shell(field: &str, command: &str) -> Result<(), String> {
    if command.trim().is_empty() || command.contains('\0') || command.len() > ARG_BYTES_MAX {
        return Err(format!("{field}: 1 to {ARG_BYTES_MAX} bytes without NUL are needed"));
    }
    Ok(())
}

fn limit(field: &str, timeout_s: Option<u64>) -> Result<(), String> {
    match timeout_s {
        Some(s) if !(1..=TEMPLATE_STEP_TIMEOUT_S_MAX).contains(&s) => {
            Err(format!("{field}: 1 to {TEMPLATE_STEP_TIMEOUT_S_MAX} seconds"))
        }
        Some(_) | None => Ok(()),
    }
}
