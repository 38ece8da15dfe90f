//! Tables for people.

use aether_types::Timestamp;
use comfy_table::{Table, presets};

use crate::output;

pub(crate) fn print(header: &[&str], rows: Vec<Vec<String>>) {
    output::line(&render(header, rows));
}

pub(super) fn render(header: &[&str], rows: Vec<Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.to_vec());
    for row in rows {
        table.add_row(row.into_iter().map(|cell| printable(&cell)).collect::<Vec<_>>());
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.join("\n")
}

/// Names, reasons and labels come from elsewhere: nothing in them may move the cursor.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// `5s`, `12m`, `3h`, `2d`: how long ago.
pub(crate) fn age(then: Timestamp, now: Timestamp) -> String {
    let seconds = (now.unix_ms() - then.unix_ms()).max(0) / 1000;
    match seconds {
        s if s < 120 => format!("{s}s"),
        s if s < 120 * 60 => format!("{}m", s / 60),
        s if s < 48 * 3600 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

pub(crate) fn or_dash(text: Option<impl ToString>) -> String {
    text.map_or_else(|| "-".to_owned(), |text| text.to_string())
}

pub(crate) fn size(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_no_trailing_blanks_and_no_control_characters() {
        let rows = vec![
            vec!["web".to_owned(), "running".to_owned()],
            vec!["a\x1b[2J".to_owned(), "x".to_owned()],
        ];
        assert_eq!(
            render(&["NAME", "STATE"], rows),
            "NAME   STATE\nweb    running\na\u{fffd}[2J  x"
        );
    }

    #[test]
    fn ages_are_short() {
        let at = Timestamp::from_unix_ms;
        for (s, text) in [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (172_800, "2d")] {
            assert_eq!(age(at(0), at(s * 1000)), text);
        }
    }
}
