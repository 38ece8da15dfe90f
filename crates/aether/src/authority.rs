//! The platform's own authority, kept by one process or several.
//!
//! ```text
//!   AUTHORITY_DIR/certificate.pem   public: clients and the fleet trust it
//!   AUTHORITY_DIR/key.pem           mode 0600; never in the store, so that a copy of that signs nothing
//! ```
//!
//! On a store of several processes the certificate is in the store too: the first one that starts
//! makes the authority, and the others know by it that theirs is elsewhere.

use std::{fs, io, os::unix::fs::DirBuilderExt as _, path::Path, sync::Arc};

use aether_store::Store;
use aether_tls::{Authority, TlsError};

use crate::{
    datadir::{read_if_there, replace},
    exit::Exit,
    failure::{Failure, chain},
};

/// Of the certificate, among what all processes on a store share.
const SHARED_NAME: &str = "authority";

pub(crate) const CERTIFICATE: &str = "certificate.pem";
const KEY: &str = "key.pem";

/// What this process knows of the fleet's authority.
#[derive(Debug, Clone)]
pub(crate) enum Known {
    Held(Arc<Authority>),
    /// Another process has the key.
    Elsewhere,
}

pub(crate) async fn open(
    folder: &Path,
    store: &dyn Store,
    is_shared: bool,
) -> Result<Known, Failure> {
    let found = read(folder)?;
    let is_new = found.is_none();
    let authority = match found {
        Some(authority) => authority,
        // Written before anybody hears of it: a certificate without a key would be the end of it.
        None => make(folder)?,
    };
    if is_shared {
        let proposed = authority.certificate();
        let kept = store.shared_secret(SHARED_NAME, proposed).await;
        let kept = kept.map_err(|e| Failure::internal("read the authority's certificate", &e))?;
        if kept != proposed.as_ref() {
            if is_new {
                forget(folder)?;
                return Ok(Known::Elsewhere);
            }
            let text = format!("the authority in {} is not that of the store", folder.display());
            return Err(Failure::new("authority_differs", Exit::Conflict, text).hint(
                "take the folder of a process that has the right one, or remove it and \
                 `aether worker join`",
            ));
        }
    }
    Ok(Known::Held(Arc::new(authority)))
}

fn read(folder: &Path) -> Result<Option<Authority>, Failure> {
    let (certificate, key) = (folder.join(CERTIFICATE), folder.join(KEY));
    let (Some(certificate_pem), Some(key_pem)) =
        (read_if_there(&certificate)?, read_if_there(&key)?)
    else {
        return Ok(None);
    };
    check_mode(&key)?;
    let (shown, shown_key) = (certificate.display().to_string(), key.display().to_string());
    let names = [shown.as_str(), shown_key.as_str()];
    let authority = Authority::from_pem(certificate_pem.as_bytes(), key_pem.as_bytes(), names);
    authority.map(Some).map_err(|e| failure(&e))
}

/// Whoever reads it can be any server of the fleet.
fn check_mode(key: &Path) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt as _;
    let meta = fs::metadata(key).map_err(|e| Failure::file("read", key, &e))?;
    const OTHERS: u32 = 0o007;
    if meta.permissions().mode() & OTHERS == 0 {
        return Ok(());
    }
    let text = format!("{} can be read by everybody on this machine", key.display());
    Err(Failure::new("key_exposed", Exit::Failure, text).hint("chmod 600 it"))
}

fn make(folder: &Path) -> Result<Authority, Failure> {
    let authority = Authority::make().map_err(|e| failure(&e))?;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
    made.map_err(|e| Failure::file("make", folder, &e))?;
    replace(&folder.join(KEY), authority.key_pem().as_bytes(), 0o600)?;
    replace(&folder.join(CERTIFICATE), authority.certificate_pem().as_bytes(), 0o644)?;
    Ok(authority)
}

/// Of an authority that nobody will ever trust.
fn forget(folder: &Path) -> Result<(), Failure> {
    for path in [folder.join(CERTIFICATE), folder.join(KEY)] {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(Failure::file("remove", &path, &e));
            }
            Ok(()) | Err(_) => {}
        }
    }
    Ok(())
}

pub(crate) fn failure(error: &TlsError) -> Failure {
    let exit = match error.code() {
        "tls_misconfigured" => Exit::Usage,
        _ => Exit::Failure,
    };
    Failure::new(error.code(), exit, chain(error))
}
