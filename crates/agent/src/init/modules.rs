//! Kernel modules of the initramfs.

use std::fs::{self, File};

use rustix::io::Errno;
use rustix::system::finit_module;

use crate::kmsg;

/// One file name a line, in the order to load them.
const ORDER: &str = "/modules/order";

/// Loads what the list names. A kernel with everything built in comes without a list.
pub(super) fn load() {
    let Ok(order) = fs::read_to_string(ORDER) else { return };
    for name in order.lines().map(str::trim).filter(|name| !name.is_empty()) {
        // Whether the guest can do without shows when what it gives is wanted.
        match File::open(format!("/modules/{name}")).map(|file| finit_module(&file, c"", 0)) {
            Ok(Ok(()) | Err(Errno::EXIST)) => {}
            Ok(Err(errno)) => kmsg!("load module {name}: {errno}"),
            Err(error) => kmsg!("open module {name}: {error}"),
        }
    }
}
