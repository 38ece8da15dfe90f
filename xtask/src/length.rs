//! Files stay short enough to be read in one sitting.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// Lines of code in one file; tests at its end are not counted.
const LINES_MAX: usize = 600;

pub(crate) fn check(root: &Path) -> Result<()> {
    let mut files = Vec::new();
    for folder in ["crates", "xtask", "tests"] {
        collect(&root.join(folder), &mut files)?;
    }
    files.sort();
    let mut long = Vec::new();
    for file in files {
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let lines = code_lines(&text);
        if lines > LINES_MAX {
            let name = file.strip_prefix(root).unwrap_or(&file).display().to_string();
            long.push(format!("{name} has {lines} lines; split it at {LINES_MAX}"));
        }
    }
    if long.is_empty() { Ok(()) } else { bail!("{}", long.join("\n")) }
}

/// Up to the tests, if they stand at the end.
fn code_lines(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .windows(2)
        .position(|pair| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod "))
        .unwrap_or(lines.len())
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                collect(&path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_at_the_end_are_not_counted() {
        assert_eq!(code_lines("a\nb\n\n#[cfg(test)]\nmod tests {\n}\n"), 3);
        assert_eq!(code_lines("a\n#[cfg(test)]\nuse b;\nc\n"), 4);
    }

    #[test]
    fn a_long_file_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("crates/a/src")).unwrap();
        fs::write(root.path().join("crates/a/src/lib.rs"), "\n".repeat(601)).unwrap();
        let error = check(root.path()).unwrap_err().to_string();
        assert_eq!(error, "crates/a/src/lib.rs has 601 lines; split it at 600");
    }
}
