//! What a VM began as, and how long its start took, in words.

use aether_api::{OriginKind, OriginView, StartView};
use aether_types::StartKind;

/// `restored in 61 ms`.
pub(super) fn brief(start: &StartView) -> String {
    let how = match start.kind {
        StartKind::Pool => "from the pool",
        StartKind::Restore => "restored",
        StartKind::Boot => "booted",
    };
    format!("{how} in {}", ms(start.total_ms))
}

/// `queue 0.4 ms, load 35 ms, ...`.
pub(super) fn phases(start: &StartView) -> String {
    let phase = |phase: &aether_api::PhaseView| format!("{} {}", phase.name, ms(phase.ms));
    start.phases.iter().map(phase).collect::<Vec<_>>().join(", ")
}

/// Two figures are enough to compare.
pub(super) fn ms(ms: f64) -> String {
    match ms {
        ms if ms < 9.95 => format!("{ms:.1} ms"),
        ms if ms < 9_999.5 => format!("{ms:.0} ms"),
        ms => format!("{:.1} s", ms / 1000.0),
    }
}

pub(super) fn origin(origin: &OriginView) -> String {
    let id = |id: Option<String>| id.unwrap_or_else(|| "unknown".to_owned());
    let template = || {
        let known = origin.template.clone();
        id(known.or_else(|| origin.template_id.map(|id| id.to_string())))
    };
    match origin.kind {
        OriginKind::Image => "image".to_owned(),
        OriginKind::Template => format!("template {}", template()),
        OriginKind::Snapshot => {
            format!("snapshot {}", id(origin.snapshot_id.map(|id| id.to_string())))
        }
        OriginKind::Builder => format!("builds {}", template()),
    }
}

#[cfg(test)]
mod tests {
    use aether_types::{StartPhase, StartReport};

    use super::*;

    #[test]
    fn a_start_is_told_in_words() {
        let phase = |name: &str, us| StartPhase { name: name.into(), us };
        let phases_of = vec![phase("queue", 420), phase("load", 60_900)];
        let start = StartReport::new(StartKind::Restore, phases_of, None).into();
        assert_eq!(brief(&start), "restored in 61 ms");
        assert_eq!(phases(&start), "queue 0.4 ms, load 61 ms");
        assert_eq!(ms(12_345.0), "12.3 s");
    }
}
