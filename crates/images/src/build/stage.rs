//! What a stage has made from which inputs, so that it is not made again.

use std::fs;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::blobs::replace_file;
use crate::manifest::Blob;
use crate::program::read_if_there;
use crate::store::{ImageStore, file_names};
use crate::{Digest, ImageError};

#[derive(serde::Deserialize, serde::Serialize)]
struct Record<T> {
    blobs: Vec<Blob>,
    product: T,
}

/// The key of inputs. The recipe's number belongs to them.
pub(crate) fn key(inputs: &impl Serialize) -> Result<Digest, ImageError> {
    let bytes = serde_json::to_vec(inputs)
        .map_err(|source| ImageError::Manifest { path: "build key".into(), source })?;
    Ok(Digest::of_bytes(&bytes))
}

/// What was made from these inputs before, where all of it is still there.
pub(crate) fn find<T: DeserializeOwned>(
    store: &ImageStore,
    name: &str,
    key: &Digest,
) -> Result<Option<T>, ImageError> {
    let path = store.folder("stages").join(format!("{name}-{}.json", key.hex()));
    let Some(bytes) = read_if_there(&path)? else { return Ok(None) };
    // A record that cannot be read is as good as none: the stage is made again.
    let Ok(record) = serde_json::from_slice::<Record<T>>(&bytes) else { return Ok(None) };
    for blob in &record.blobs {
        match store.blobs.checked_path(name, &blob.digest) {
            Ok(_) => {}
            Err(ImageError::MissingBlob { .. } | ImageError::DamagedBlob { .. }) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Some(record.product))
}

pub(crate) fn keep<T: Serialize>(
    store: &ImageStore,
    name: &str,
    key: &Digest,
    blobs: &[&Blob],
    product: &T,
) -> Result<(), ImageError> {
    let path = store.folder("stages").join(format!("{name}-{}.json", key.hex()));
    let record = Record { blobs: blobs.iter().copied().cloned().collect(), product };
    let bytes = serde_json::to_vec_pretty(&record)
        .map_err(|source| ImageError::Manifest { path: path.clone(), source })?;
    replace_file(&store.folder("tmp"), &path, &bytes)
}

/// Removes the records of stages whose blobs are gone.
pub(crate) fn forget(store: &ImageStore) -> Result<(), ImageError> {
    let folder = store.folder("stages");
    for name in file_names(&folder)? {
        let path = folder.join(name);
        let Some(bytes) = read_if_there(&path)? else { continue };
        let whole = serde_json::from_slice::<Record<serde_json::Value>>(&bytes)
            .is_ok_and(|record| record.blobs.iter().all(|blob| store.blobs.has(blob)));
        if !whole {
            fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
        }
    }
    Ok(())
}
