//! The tools of a VM: layers that are there, checked and pinned, until its machine has links of its
//! own to them.

use std::sync::Arc;

use aether_drivers::{LayerFile, layer_places};
use aether_protocol::Layer;
use aether_tools::{BaseImage, Builder, ReadyLayer, ToolError};
use aether_types::{DriverKind, ToolRequest, Vm, VmTool};

use crate::{
    builder::{MachineBuilder, SimulatedBuilder},
    failure::{Failure, blocking},
    fault,
    tool_build::{Telling, vm_tool},
    worker::Core,
};

/// Needs more of the kernel than a guest starts with.
const WANTS_MODULES: &str = "docker";

#[derive(Debug, Default)]
pub(crate) struct Toolset {
    /// By name, as they were asked for.
    pub(crate) layers: Vec<LayerFile>,
    pub(crate) tools: Vec<VmTool>,
    /// Not pruned meanwhile.
    _pins: Vec<ReadyLayer>,
}

impl Toolset {
    /// These over what there is already: what is there and on top stays where it is.
    pub(crate) fn over(&self, there: &[LayerFile]) -> Vec<LayerFile> {
        let is_on_top = |layer: &&LayerFile| {
            let same = there.iter().rev().find(|other| tool_of(other) == tool_of(layer));
            same.is_some_and(|other| other.digest == layer.digest)
        };
        let mut layers = there.to_vec();
        layers.extend(self.layers.iter().filter(|layer| !is_on_top(layer)).cloned());
        layers
    }

    /// What the layers are by content: part of the name of a template that has them.
    pub(crate) fn digests(&self) -> Vec<&str> {
        self.layers.iter().map(|layer| layer.digest.as_str()).collect()
    }
}

fn tool_of(layer: &LayerFile) -> &str {
    layer.name.split('@').next().unwrap_or_default()
}

/// As the guest is told of them.
pub(crate) fn places(layers: &[LayerFile]) -> Result<Vec<Layer>, Failure> {
    layer_places(layers).map_err(|error| Failure::last(fault::from_driver(&error)))
}

impl Core {
    /// What a VM asks for.
    pub(crate) async fn toolset_of(&self, vm: &Vm, telling: &Telling) -> Result<Toolset, Failure> {
        self.toolset(&vm.spec.tools, &vm.spec.image, vm.spec.driver, telling).await
    }

    /// The layers of these tools on an image: from the cache, else built.
    pub(crate) async fn toolset(
        &self,
        wanted: &[ToolRequest],
        image: &str,
        driver: DriverKind,
        telling: &Telling,
    ) -> Result<Toolset, Failure> {
        if wanted.is_empty() {
            return Ok(Toolset::default());
        }
        let ready = self.ready_layers(wanted, image, driver, telling).await?;
        let mut layers = Vec::with_capacity(ready.len() + 1);
        if driver != DriverKind::Sim && wanted.iter().any(|tool| tool.name == WANTS_MODULES) {
            let (images, name) = (Arc::clone(&self.parts.images), image.to_owned());
            let modules = blocking("read the image", move || images.module_layer(&name)).await?;
            layers.extend(modules.map_err(Failure::last)?);
        }
        layers.extend(ready.iter().map(layer_file));
        let tools = ready.iter().map(vm_tool).collect();
        Ok(Toolset { layers, tools, _pins: ready })
    }

    pub(crate) async fn ready_layers(
        &self,
        wanted: &[ToolRequest],
        image: &str,
        driver: DriverKind,
        telling: &Telling,
    ) -> Result<Vec<ReadyLayer>, Failure> {
        let Some(first) = wanted.first() else { return Ok(Vec::new()) };
        let base = self.base_image(image).await?;
        let builder = self.builder(driver).map_err(|reason| {
            let ToolRequest { name: tool, version } = first.clone();
            Failure::tool(&ToolError::BuilderUnavailable { tool, version, reason })
        })?;
        let progress = |event| telling.hear(event);
        let ensured = self.parts.tools.ensure(wanted, &base, &builder, &progress).await;
        ensured.map_err(|error| Failure::tool(&error))
    }

    async fn base_image(&self, image: &str) -> Result<BaseImage, Failure> {
        let (images, name) = (Arc::clone(&self.parts.images), image.to_owned());
        let base = blocking("read the image", move || images.base(&name)).await?;
        base.map_err(Failure::last)
    }

    /// What builds layers for machines of this kind: QEMU's machines have an output disk.
    fn builder(&self, kind: DriverKind) -> Result<Arc<dyn Builder>, String> {
        if kind == DriverKind::Sim {
            return Ok(Arc::new(SimulatedBuilder));
        }
        let mut drivers = self.parts.drivers.iter();
        let Some(driver) = drivers.find(|d| d.capabilities().kind == DriverKind::Qemu) else {
            return Err("tools are built in a machine of QEMU, which this worker does not have \
                        (`aether doctor` says why)"
                .to_owned());
        };
        Ok(Arc::new(MachineBuilder {
            driver: Arc::clone(driver),
            images: Arc::clone(&self.parts.images),
            boots: Arc::clone(&self.boots),
            start_limit: self.parts.config.start_limit,
            guest_limit: self.parts.config.guest_limit,
            tasks: self.tasks.clone(),
        }))
    }
}

fn layer_file(ready: &ReadyLayer) -> LayerFile {
    LayerFile {
        name: format!("{}@{}", ready.name, ready.got),
        path: ready.path.clone(),
        digest: ready.digest.clone(),
        bytes: ready.size_bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(name: &str) -> LayerFile {
        LayerFile { name: name.into(), path: "/x".into(), digest: name.into(), bytes: 4096 }
    }

    #[test]
    fn what_is_on_top_stays_and_the_rest_comes_over_it() {
        let set = |names: &[&str]| Toolset {
            layers: names.iter().map(|name| layer(name)).collect(),
            ..Toolset::default()
        };
        let over = |set: &Toolset, there: &[&str]| -> Vec<String> {
            let there: Vec<_> = there.iter().map(|name| layer(name)).collect();
            set.over(&there).into_iter().map(|layer| layer.name).collect()
        };
        let wanted = set(&["bun@1", "nodejs@22"]);
        assert_eq!(over(&wanted, &[]), ["bun@1", "nodejs@22"]);
        assert_eq!(over(&wanted, &["nodejs@20", "bun@1"]), ["nodejs@20", "bun@1", "nodejs@22"]);
        assert_eq!(over(&wanted, &["bun@1", "nodejs@22"]), ["bun@1", "nodejs@22"]);
        // It is there, below another version.
        let older = set(&["nodejs@20"]);
        assert_eq!(
            over(&older, &["nodejs@20", "nodejs@22"]),
            ["nodejs@20", "nodejs@22", "nodejs@20"]
        );
    }
}
