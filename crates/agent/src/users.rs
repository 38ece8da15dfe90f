//! Users and groups, from `/etc/passwd` and `/etc/group` alone.

use std::fs;

use aether_protocol::ErrorCode;

use crate::error::Fail;

/// Who runs a command or touches a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: String,
    pub(crate) shell: String,
}

const DEFAULT_SHELL: &str = "/bin/sh";
/// Linux `NGROUPS_MAX`.
const GROUPS_MAX: usize = 65536;

/// Finds `name`, `name:group`, `uid` or `uid:gid`; without one, root.
pub(crate) fn find(wanted: Option<&str>) -> Result<User, Fail> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let Some(wanted) = wanted else { return Ok(entry(&passwd, "root").unwrap_or_else(root)) };
    let group = fs::read_to_string("/etc/group").unwrap_or_default();
    resolve(wanted, &passwd, &group)
}

fn root() -> User {
    User {
        name: "root".into(),
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        home: "/root".into(),
        shell: DEFAULT_SHELL.into(),
    }
}

fn resolve(wanted: &str, passwd: &str, group: &str) -> Result<User, Fail> {
    let (name, group_name) = match wanted.split_once(':') {
        Some((name, group_name)) => (name, Some(group_name)),
        None => (wanted, None),
    };
    let unknown = || Fail::new(ErrorCode::NoSuchUser, format!("no user {wanted:?} in the guest"));
    let mut user = match (entry(passwd, name), name.parse::<u32>()) {
        (Some(user), _) => user,
        // The kernel takes the highest id for "do not change".
        (None, Ok(u32::MAX) | Err(_)) => return Err(unknown()),
        // A number without an entry is a user without a name or a home.
        (None, Ok(uid)) => {
            User { name: uid.to_string(), uid, gid: uid, home: "/".into(), ..root() }
        }
    };
    user.groups = memberships(group, &user.name);
    if let Some(group_name) = group_name {
        user.gid = group_id(group, group_name).ok_or_else(unknown)?;
        user.groups.clear();
    }
    Ok(user)
}

/// By name first, then by number.
fn entry(passwd: &str, wanted: &str) -> Option<User> {
    let by_name = passwd.lines().find(|line| line.split(':').next() == Some(wanted));
    let by_number = || passwd.lines().find(|line| line.split(':').nth(2) == Some(wanted));
    let mut fields = by_name.or_else(by_number)?.split(':');
    let name = fields.next()?.to_owned();
    let uid = fields.nth(1)?.parse().ok()?;
    let gid = fields.next()?.parse().ok()?;
    let home = fields.nth(1).filter(|home| home.starts_with('/')).unwrap_or("/").to_owned();
    let shell = fields.next().filter(|shell| !shell.is_empty()).unwrap_or(DEFAULT_SHELL).to_owned();
    Some(User { name, uid, gid, groups: Vec::new(), home, shell })
}

fn group_id(group: &str, wanted: &str) -> Option<u32> {
    let named = group.lines().find(|line| line.split(':').next() == Some(wanted));
    match named {
        Some(line) => line.split(':').nth(2)?.parse().ok(),
        None => wanted.parse().ok().filter(|&gid| gid != u32::MAX),
    }
}

fn memberships(group: &str, name: &str) -> Vec<u32> {
    let is_member = |line: &&str| {
        line.split(':').nth(3).is_some_and(|members| members.split(',').any(|it| it == name))
    };
    let ids =
        group.lines().filter(is_member).filter_map(|line| line.split(':').nth(2)?.parse().ok());
    ids.take(GROUPS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        builder:x:1000:1000:,,,:/home/builder:/bin/sh\nbroken\nbad:x:a:b:c:d:e\n";
    const GROUP: &str =
        "root:x:0:\nbuilder:x:1000:\ndocker:x:999:builder,other\nkvm:x:50:builder\n";

    fn found(wanted: &str) -> User {
        resolve(wanted, PASSWD, GROUP).unwrap()
    }

    #[test]
    fn user_is_found_by_name_and_by_number_with_its_groups() {
        let builder = found("builder");
        assert_eq!(
            (builder.uid, builder.gid, builder.home.as_str()),
            (1000, 1000, "/home/builder")
        );
        assert_eq!(builder.groups, [999, 50]);
        assert_eq!(found("1000"), builder);
    }

    #[test]
    fn group_may_be_named_or_numbered() {
        assert_eq!(found("builder:docker").gid, 999);
        assert_eq!((found("1234:77").uid, found("1234:77").gid), (1234, 77));
        assert!(found("builder:docker").groups.is_empty());
    }

    #[test]
    fn unknown_names_and_broken_lines_are_refused() {
        for wanted in ["nobody-here", "bad", "builder:nothing", "4294967295", "", ":"] {
            let fail = resolve(wanted, PASSWD, GROUP).unwrap_err();
            assert_eq!(fail.code, ErrorCode::NoSuchUser, "{wanted}");
        }
    }
}
