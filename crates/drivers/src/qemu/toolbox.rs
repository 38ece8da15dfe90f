//! The layers device: one read-only disk of a fixed size in every machine, on which the layers of
//! tools are at their places ([`crate::layer_places`]), nothing of them copied.
//!
//! ```text
//!   toolsN   the device's drive: layer N at its place, and what is below ─┐ each three nodes, see
//!   tools1   layer 1 at its place, and what is below                      ┘ aether_images::Placement
//!   tools0   zeros, as long as the device
//! ```
//!
//! Each layer is opened for reading by the worker; QEMU is given descriptors. More are put on top
//! of a machine that runs as a new top layer of its disk is: the guest sees other bytes where it
//! has read nothing yet.

use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, PoisonError},
};

use aether_images::{Placement, write_placement};
use aether_protocol::limits::LAYERS_DEVICE_BYTES;
use aether_types::MachineId;
use serde_json::{Value, json};

use super::{qmp::Qmp, snapshot::drive_of};
use crate::{
    DriverError, LayerFile,
    host::{Host, blocking},
    layer_places,
    machines::Place,
    tools,
};

/// The device.
pub(super) const TOOLS_ID: &str = "tools";
/// The device with a builder's output.
pub(super) const OUTPUT_ID: &str = "output";

/// Layers, opened, with the metadata that places them.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) metadata: OwnedFd,
    /// With the number of the first.
    pub(super) layers: Vec<(OwnedFd, Placement)>,
}

/// The metadata of layers at their places: sealed, so that machines can share it.
struct Metadata {
    /// Of all layers up to the last that it places.
    digests: Vec<String>,
    /// Those before it are placed elsewhere.
    have: usize,
    file: OwnedFd,
    placements: Vec<Placement>,
}

/// Of the lists that were used last, the newest at the end. A few hundred kilobytes each.
static METADATA: Mutex<Vec<Arc<Metadata>>> = Mutex::new(Vec::new());
const METADATA_MAX: usize = 16;

/// Opens the layers of a machine after the first `have`. `None`: there are no more.
pub(super) fn place(
    host: &Host,
    id: MachineId,
    layers: &[LayerFile],
    have: usize,
) -> Result<Option<Placed>, DriverError> {
    if layers.len() <= have {
        return Ok(None);
    }
    let added = layers.iter().enumerate().skip(have);
    let files: Vec<File> = added
        .map(|(number, layer)| tools::open(host, id, number, layer))
        .collect::<Result<_, DriverError>>()?;
    let metadata = metadata(layers, have, &files)?;
    let file = metadata.file.try_clone().map_err(|source| DriverError::Io {
        action: "share the places of layers".to_owned(),
        source,
    })?;
    let files = files.into_iter().map(OwnedFd::from);
    let layers = files.zip(metadata.placements.iter().cloned()).collect();
    Ok(Some(Placed { metadata: file, layers }))
}

/// Places follow from the layers alone, so machines with the same ones have the same metadata.
fn metadata(
    layers: &[LayerFile],
    have: usize,
    files: &[File],
) -> Result<Arc<Metadata>, DriverError> {
    let digests = || layers.iter().map(|layer| layer.digest.as_str());
    let mut known = METADATA.lock().unwrap_or_else(PoisonError::into_inner);
    let is_it = |m: &Arc<Metadata>| m.have == have && digests().eq(m.digests.iter());
    let found = if let Some(at) = known.iter().position(is_it) {
        known.remove(at)
    } else {
        let (file, placements) = write(layers, have, files)?;
        let digests = digests().map(str::to_owned).collect();
        Arc::new(Metadata { digests, have, file, placements })
    };
    if known.len() == METADATA_MAX {
        known.remove(0);
    }
    known.push(Arc::clone(&found));
    Ok(found)
}

fn write(
    layers: &[LayerFile],
    have: usize,
    files: &[File],
) -> Result<(OwnedFd, Vec<Placement>), DriverError> {
    let places = layer_places(layers)?;
    let mut placements = Vec::with_capacity(files.len());
    let file = tools::frozen_memory(|metadata| {
        let mut at = 0;
        for (layer, place) in files.iter().zip(places.iter().skip(have)) {
            let on_device = (place.offset, LAYERS_DEVICE_BYTES);
            let placement = write_placement(metadata, at, layer, place.length, on_device)?;
            at = placement.inner.end;
            placements.push(placement);
        }
        Ok(())
    })?;
    Ok((file, placements))
}

/// The name in QEMU of what has the first `count` layers.
pub(super) fn node_name(count: usize) -> String {
    format!("tools{count}")
}

fn count_of(node: &str) -> Option<usize> {
    node.strip_prefix("tools")?.parse().ok()
}

/// Nothing but zeros.
pub(super) fn lowest() -> Value {
    json!({
        "driver": "null-co", "node-name": node_name(0), "size": LAYERS_DEVICE_BYTES,
        "read-zeroes": true, "read-only": true,
    })
}

/// A file in QEMU's set of this number. Many have it open, and nobody writes it.
fn file(set: i64) -> Value {
    json!({
        "driver": "file", "filename": format!("/dev/fdset/{set}"), "read-only": true,
        "locking": "off",
    })
}

/// Layer `count`, over `below`; `Null` stands for one that is put there later.
pub(super) fn node(
    count: usize,
    (metadata, layer): (i64, i64),
    placement: &Placement,
    below: &Value,
) -> Value {
    let window = |range: &std::ops::Range<u64>| {
        json!({
            "driver": "raw", "read-only": true, "file": file(metadata),
            "offset": range.start, "size": range.end - range.start,
        })
    };
    let inner = json!({
        "driver": "qcow2", "read-only": true, "file": window(&placement.inner),
        "data-file": file(layer), "backing": window(&placement.outer),
    });
    json!({
        "driver": "qcow2", "node-name": node_name(count), "read-only": true, "file": inner,
        "backing": below,
    })
}

/// Puts the layers of a machine after the first `have` over those that its QEMU has.
pub(super) async fn add(place: &Place, qmp: &Qmp, have: usize) -> Result<(), DriverError> {
    let top = drive_of(qmp, TOOLS_ID).await?;
    // An attempt whose end was not recorded may have come further.
    let have = have.max(count_of(&top).unwrap_or(0));
    let (host, id) = (Arc::clone(&place.host), place.id());
    let layers = place.record.spec.layers.clone();
    let Some(placed) = blocking(move || self::place(&host, id, &layers, have)).await? else {
        return Ok(());
    };
    let metadata = qmp.add_fd(placed.metadata).await?;
    for (number, (layer, placement)) in placed.layers.into_iter().enumerate() {
        let (below, count) = (node_name(have + number), have + number + 1);
        let layer = qmp.add_fd(layer).await?;
        // Of an attempt that did not come to use it; mostly there is none.
        let _ = qmp.execute("blockdev-del", json!({ "node-name": node_name(count) })).await;
        let node = node(count, (metadata, layer), &placement, &Value::Null);
        qmp.execute("blockdev-add", node).await?;
        let nodes = json!({ "node": below, "overlay": node_name(count) });
        qmp.execute("blockdev-snapshot", nodes).await?;
    }
    Ok(())
}
