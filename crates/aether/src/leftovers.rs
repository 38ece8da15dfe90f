//! What is left of a platform on this host once it has ended: for `doctor`, which promises that
//! nothing is.

use std::{fs, path::Path};

/// In words, one for each thing. `instance` is the name of the platform's network.
pub(crate) fn of(data_dir: &Path, instance: Option<&str>) -> Vec<String> {
    let mut left = processes(data_dir);
    left.extend(mounts(data_dir));
    left.extend(files(&data_dir.join("vms")));
    if let Some(instance) = instance {
        left.extend(aether_drivers::network::leftovers(Some(instance)));
    }
    left
}

/// A VMM works in its VM's folder, or has the data directory on its command line.
fn processes(data_dir: &Path) -> Vec<String> {
    let wanted = data_dir.display().to_string();
    let us = std::process::id().to_string();
    let mut left = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_string_lossy().into_owned();
        if pid == us || !pid.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        // One that ends meanwhile is not left.
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let works_in = fs::read_link(entry.path().join("cwd"));
        if works_in.is_ok_and(|folder| folder.starts_with(data_dir))
            || String::from_utf8_lossy(&line).contains(&wanted)
        {
            let program = line.split(|b| *b == 0).next().unwrap_or_default();
            left.push(format!("process {pid} ({})", String::from_utf8_lossy(program)));
        }
    }
    left
}

fn mounts(data_dir: &Path) -> Vec<String> {
    let wanted = data_dir.display().to_string();
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let targets = table.lines().filter_map(|line| line.split(' ').nth(1));
    targets.filter(|target| target.starts_with(&wanted)).map(|t| format!("mount {t}")).collect()
}

fn files(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| format!("file {}", entry.path().display())).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        process::Stdio,
    };

    use super::*;

    #[test]
    fn a_file_and_a_process_are_found() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(of(root.path(), None), Vec::<String>::new());
        fs::create_dir_all(root.path().join("vms/a")).unwrap();
        let mut child = std::process::Command::new("cat")
            .current_dir(root.path().join("vms/a"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // What it echoes shows that it is there.
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let left = of(root.path(), None);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(left.len(), 2, "{left:?}");
    }
}
