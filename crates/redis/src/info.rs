//! What a server says of itself.

use std::collections::HashMap;

/// The oldest version that has all that we ask: scripts that say whether they may run when memory
/// is full.
pub const VERSION_MIN: u32 = 7;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Info {
    pub version: String,
    /// The number before the version's first dot.
    pub major: u32,
    /// Another one each time that the server is started.
    pub run_id: String,
    /// 0: as much as there is.
    pub memory_max: u64,
    /// Such as `noeviction`.
    pub eviction: String,
    pub has_append_only_file: bool,
}

impl Info {
    pub(crate) fn read(text: &str) -> Self {
        let fields: HashMap<&str, &str> =
            text.lines().filter_map(|line| line.trim_end().split_once(':')).collect();
        let get = |name| fields.get(name).copied().unwrap_or_default();
        let version = get("redis_version").to_owned();
        let major = version.split('.').next().and_then(|digits| digits.parse().ok()).unwrap_or(0);
        Self {
            version,
            major,
            run_id: get("run_id").to_owned(),
            memory_max: get("maxmemory").parse().unwrap_or(0),
            eviction: get("maxmemory_policy").to_owned(),
            has_append_only_file: get("aof_enabled") == "1",
        }
    }

    /// Whether the server throws away what was not said to be thrown away when memory is full.
    pub fn evicts(&self) -> bool {
        self.memory_max > 0 && self.eviction.starts_with("allkeys")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read() {
        let text = "# Server\r\nredis_version:7.0.15\r\nrun_id:abc\r\n\r\n# Memory\r\n\
                    maxmemory:1024\r\nmaxmemory_policy:allkeys-lru\r\naof_enabled:1\r\n";
        let read = Info::read(text);
        assert_eq!((read.version.as_str(), read.major, read.run_id.as_str()), ("7.0.15", 7, "abc"));
        assert!(read.evicts() && read.has_append_only_file);
        assert_eq!(Info::read("").major, 0);
    }
}
