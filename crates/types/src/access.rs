//! Who may do what: the role of a key, its scopes, and the one decision that is made of them.
//!
//! A request needs one verb on one resource. A role allows some of them, scopes narrow that down,
//! and what concerns the whole platform is allowed to nobody outside of the default project.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::ProjectId;

macro_rules! words {
    ($(#[$doc:meta])* $name:ident, $noun:literal {
        $($(#[$item:meta])* $variant:ident = $text:literal),+ $(,)?
    }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $($(#[$item])* $variant),+ }

        impl $name {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                Self::ALL.iter().copied().find(|one| one.as_str() == text).ok_or_else(|| {
                    let known: Vec<_> = Self::ALL.iter().map(|one| one.as_str()).collect();
                    format!(concat!("unknown ", $noun, "; one of {}"), known.join(", "))
                })
            }
        }
    };
}

words!(
    /// What a request is about.
    Resource, "resource" {
        Vms = "vms",
        /// Commands and terminals, and what they printed.
        Executions = "executions",
        /// In guests.
        Files = "files",
        Snapshots = "snapshots",
        /// And pools.
        Templates = "templates",
        Tools = "tools",
        Tasks = "tasks",
        /// What has happened to any of these.
        Events = "events",
        Keys = "keys",
        /// Who did what.
        Audit = "audit",
        /// All of them: making and deleting projects, and giving keys to others.
        Projects = "projects",
        /// What concerns everybody: what tools are kept, how big a cache is.
        Platform = "platform",
    }
);

words!(
    Verb, "verb" {
        Read = "read",
        /// Making, changing and ending; whoever may do that may also look.
        Write = "write",
    }
);

words!(
    /// From less to more.
    Role, "role" {
        /// Looks at what the platform knows, and at nothing inside of a guest.
        Viewer = "viewer",
        /// Works with VMs and what belongs to them.
        Operator = "operator",
        /// Gives and takes keys too, and sees who did what.
        Admin = "admin",
    }
);

impl Role {
    fn allows(self, resource: Resource, verb: Verb) -> bool {
        match resource {
            Resource::Vms
            | Resource::Executions
            | Resource::Snapshots
            | Resource::Templates
            | Resource::Tools
            | Resource::Tasks
            | Resource::Events => self >= Self::Operator || verb == Verb::Read,
            Resource::Files => self >= Self::Operator,
            Resource::Keys | Resource::Audit | Resource::Projects | Resource::Platform => {
                self == Self::Admin
            }
        }
    }
}

impl Resource {
    /// Of the platform and of no project alone.
    #[must_use]
    pub fn is_shared(self) -> bool {
        match self {
            Self::Projects | Self::Platform => true,
            Self::Vms
            | Self::Executions
            | Self::Files
            | Self::Snapshots
            | Self::Templates
            | Self::Tools
            | Self::Tasks
            | Self::Events
            | Self::Keys
            | Self::Audit => false,
        }
    }
}

/// One verb on one resource, written `vms:read`. `write` has `read` in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scope {
    pub resource: Resource,
    pub verb: Verb,
}

impl Scope {
    /// Every scope there is.
    pub fn all() -> impl Iterator<Item = Self> {
        Resource::ALL
            .iter()
            .flat_map(|&resource| Verb::ALL.iter().map(move |&verb| Self { resource, verb }))
    }

    fn holds(self, other: Self) -> bool {
        self.resource == other.resource && self.verb >= other.verb
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.resource, self.verb)
    }
}

impl FromStr for Scope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (resource, verb) = text
            .split_once(':')
            .ok_or_else(|| "write RESOURCE:read or RESOURCE:write".to_owned())?;
        Ok(Self { resource: resource.parse()?, verb: verb.parse()? })
    }
}

impl Serialize for Scope {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Scope {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// All that decides what a key may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    pub project: ProjectId,
    pub role: Role,
    /// Empty: all that the role may.
    pub scopes: Vec<Scope>,
}

impl Access {
    #[must_use]
    pub fn allows(&self, needed: Scope) -> bool {
        let at_home = !needed.resource.is_shared() || self.project == ProjectId::DEFAULT;
        let in_scope = self.scopes.is_empty() || self.scopes.iter().any(|s| s.holds(needed));
        at_home && in_scope && self.role.allows(needed.resource, needed.verb)
    }

    /// The first thing that `other` may do, in its project, and this may not in its own: nobody
    /// gives more than they have.
    #[must_use]
    pub fn lacks(&self, other: &Self) -> Option<Scope> {
        Scope::all().find(|&scope| other.allows(scope) && !self.allows(scope))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn access(role: Role, scopes: &[&str]) -> Access {
        let scopes = scopes.iter().map(|text| text.parse().unwrap()).collect();
        Access { project: ProjectId::DEFAULT, role, scopes }
    }

    fn allowed(access: &Access) -> String {
        let scopes: Vec<_> =
            Scope::all().filter(|&s| access.allows(s)).map(|s| s.to_string()).collect();
        scopes.join(" ")
    }

    #[test]
    fn roles_allow_what_is_written_here() {
        assert_eq!(
            allowed(&access(Role::Viewer, &[])),
            "vms:read executions:read snapshots:read templates:read tools:read tasks:read events:read"
        );
        assert_eq!(
            allowed(&access(Role::Operator, &[])),
            "vms:read vms:write executions:read executions:write files:read files:write \
             snapshots:read snapshots:write templates:read templates:write tools:read tools:write \
             tasks:read tasks:write events:read events:write"
        );
        let admin = access(Role::Admin, &[]);
        assert!(Scope::all().all(|scope| admin.allows(scope)));
    }

    #[test]
    fn scopes_narrow_and_never_widen() {
        assert_eq!(allowed(&access(Role::Admin, &["vms:read"])), "vms:read");
        assert_eq!(allowed(&access(Role::Admin, &["vms:write"])), "vms:read vms:write");
        assert_eq!(allowed(&access(Role::Viewer, &["vms:write", "keys:write"])), "vms:read");
    }

    #[test]
    fn the_platform_is_for_the_default_project_alone() {
        let admin = Access { project: ProjectId::new(), ..access(Role::Admin, &[]) };
        assert!(!admin.allows("platform:read".parse().unwrap()));
        assert!(!admin.allows("projects:read".parse().unwrap()));
        assert!(admin.allows("keys:write".parse().unwrap()));
        // An admin of all may make one of a project, and not the other way round.
        assert_eq!(access(Role::Admin, &[]).lacks(&admin), None);
        let lacking = admin.lacks(&access(Role::Admin, &[])).unwrap();
        assert_eq!(lacking.to_string(), "projects:read");
    }

    #[test]
    fn scopes_have_one_spelling() {
        for scope in Scope::all() {
            assert_eq!(scope.to_string().parse(), Ok(scope));
            assert_eq!(serde_json::to_string(&scope).unwrap(), format!("\"{scope}\""));
        }
        for bad in ["", "vms", "vms:", "vms:all", ":read", "VMS:read", "vms:read:write"] {
            assert!(bad.parse::<Scope>().is_err(), "{bad}");
        }
    }

    prop_compose! {
        fn any_access()(
            role in 0..Role::ALL.len(),
            scopes in proptest::collection::vec(0..Scope::all().count(), 0..4),
            at_home: bool,
        ) -> Access {
            let all: Vec<_> = Scope::all().collect();
            let project = if at_home { ProjectId::DEFAULT } else { ProjectId::new() };
            let scopes = scopes.into_iter().map(|n| all[n]).collect();
            Access { project, role: Role::ALL[role], scopes }
        }
    }

    proptest! {
        #[test]
        fn nobody_gives_more_than_they_have(giver in any_access(), given in any_access()) {
            let given = Access { project: giver.project, ..given };
            if giver.lacks(&given).is_none() {
                for scope in Scope::all() {
                    prop_assert!(!given.allows(scope) || giver.allows(scope));
                }
            }
            prop_assert_eq!(giver.lacks(&giver), None);
        }
    }
}
