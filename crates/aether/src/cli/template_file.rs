//! A template's content, from a template file or from options. See `docs/templates.md`.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use aether_api::BuildTemplate;
use aether_types::{DriverKind, NetworkPolicy, TemplateFile, TemplateReady, TemplateStep};
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::{args::TemplateBuild, exit::Exit, failure::Failure};

/// As people write it: where one word is enough, one word does.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    name: Option<String>,
    tag: Option<String>,
    image: Option<String>,
    driver: Option<DriverKind>,
    vcpus: Option<u32>,
    memory_mb: Option<u32>,
    disk_mb: Option<u32>,
    start: Option<String>,
    ready: Option<Ready>,
    network: Option<NetworkPolicy>,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    files: Vec<FileEntry>,
    #[serde(default)]
    steps: Vec<Step>,
    #[serde(default)]
    tools: Vec<String>,
    default_tools: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a command, or a table with `run` and `timeout_s`")]
enum Step {
    Command(String),
    Full(TemplateStep),
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "a command, or a table with `command` and `timeout_s`")]
enum Ready {
    Command(String),
    Full(TemplateReady),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntry {
    /// In the guest.
    path: String,
    content: Option<String>,
    /// Here; beside the template file where it is not absolute.
    source: Option<PathBuf>,
    /// Octal, as text.
    #[serde(default, deserialize_with = "mode")]
    mode: Option<u32>,
}

fn mode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let text = String::deserialize(deserializer)?;
    u32::from_str_radix(&text, 8)
        .map(Some)
        .map_err(|_| D::Error::custom("write permission bits as text, such as \"0755\""))
}

const MODE_DEFAULT: u32 = 0o644;

/// What the command line asks to be built.
pub(super) fn request(args: TemplateBuild) -> Result<BuildTemplate, Failure> {
    let mut request = match &args.file {
        Some(path) => read(path)?,
        None => of_options(&args)?,
    };
    if let Some(name) = args.name {
        request.name = name;
    }
    request.tag = args.tag.or(request.tag);
    request.env.extend(args.env);
    if request.name.is_empty() {
        return Err(Failure::usage("the template has no name").hint("give it with --name"));
    }
    Ok(request)
}

fn read(path: &Path) -> Result<BuildTemplate, Failure> {
    let text = fs::read_to_string(path).map_err(|e| Failure::file("read", path, &e))?;
    let is_json = path.extension().is_some_and(|extension| extension == "json");
    let parsed: Result<Document, String> = if is_json {
        serde_json::from_str(&text).map_err(|error| error.to_string())
    } else {
        toml::from_str(&text).map_err(|error| error.to_string().trim_end().to_owned())
    };
    let document = parsed.map_err(|error| {
        Failure::new("template_malformed", Exit::Usage, format!("{}: {error}", path.display()))
            .hint("docs/templates.md has the form of a template file")
    })?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let files = document.files.into_iter().map(|entry| file(entry, folder));
    Ok(BuildTemplate {
        name: document.name.unwrap_or_default(),
        tag: document.tag,
        image: document.image,
        driver: document.driver,
        vcpus: document.vcpus,
        memory_mb: document.memory_mb,
        disk_mb: document.disk_mb,
        start: document.start,
        env: document.env,
        ready: document.ready.map(|ready| match ready {
            Ready::Command(command) => TemplateReady { command, timeout_s: None },
            Ready::Full(ready) => ready,
        }),
        network: document.network,
        tools: document.tools,
        default_tools: document.default_tools,
        files: files.collect::<Result<_, _>>()?,
        steps: document.steps.into_iter().map(Step::into).collect(),
    })
}

impl From<Step> for TemplateStep {
    fn from(step: Step) -> Self {
        match step {
            Step::Command(run) => Self { run, timeout_s: None },
            Step::Full(step) => step,
        }
    }
}

fn file(entry: FileEntry, folder: &Path) -> Result<TemplateFile, Failure> {
    let FileEntry { path, content, source, mode } = entry;
    match (content, source) {
        (Some(content), None) => {
            Ok(TemplateFile { path, content, mode: mode.unwrap_or(MODE_DEFAULT) })
        }
        (None, Some(source)) => copy(&folder.join(source), path, mode),
        (Some(_), Some(_)) | (None, None) => {
            Err(Failure::usage(format!("the file {path} needs one of `content` and `source`")))
        }
    }
}

/// A file of this machine, with its permission bits where none are given.
fn copy(source: &Path, path: String, mode: Option<u32>) -> Result<TemplateFile, Failure> {
    let failed = |error| Failure::file("read", source, &error);
    let found = fs::metadata(source).map_err(failed)?.permissions().mode() & 0o777;
    let content = fs::read(source).map_err(failed)?;
    let content = String::from_utf8(content).map_err(|_| {
        Failure::usage(format!("{} is not UTF-8 text", source.display()))
            .hint("let a step fetch or make it")
    })?;
    Ok(TemplateFile { path, content, mode: mode.unwrap_or(found) })
}

fn of_options(args: &TemplateBuild) -> Result<BuildTemplate, Failure> {
    let files = args.copy.iter().map(|pair| match pair.split_once(':') {
        Some((here, guest)) if !here.is_empty() && guest.starts_with('/') => {
            copy(Path::new(here), guest.to_owned(), None)
        }
        Some(_) | None => Err(Failure::usage(format!("--copy {pair}: write HERE:/GUEST/PATH"))),
    });
    let step = |run: &String| TemplateStep { run: run.clone(), timeout_s: None };
    let ready = args.ready.clone();
    Ok(BuildTemplate {
        image: args.image.clone(),
        driver: args.driver,
        vcpus: args.vcpus,
        memory_mb: args.memory,
        disk_mb: args.disk,
        start: args.start.clone(),
        ready: ready.map(|command| TemplateReady { command, timeout_s: None }),
        files: files.collect::<Result<_, _>>()?,
        steps: args.run.iter().map(step).collect(),
        tools: args.tools.iter().map(ToString::to_string).collect(),
        default_tools: args.no_default_tools.then_some(false),
        ..BuildTemplate::default()
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Args, Command, Template};

    const PAGE: &str = include_str!("../../../../docs/templates.md");

    fn build(options: &[&str]) -> Result<BuildTemplate, Failure> {
        let line = ["aether", "template", "build"].iter().chain(options);
        let args = Args::try_parse_from(line).unwrap();
        let Command::Template(Template::Build(args)) = args.command else { panic!("not build") };
        request(args)
    }

    /// The example of the page, as a file beside what it copies.
    #[test]
    fn the_documented_example_is_read() {
        let (_, rest) = PAGE.split_once("```toml\n").unwrap();
        let (example, _) = rest.split_once("```").unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("site.py"), "print('hello')\n").unwrap();
        let file = folder.path().join("web.toml");
        fs::write(&file, example).unwrap();
        let path = file.display().to_string();
        let request = build(&["-f", &path, "--tag", "v2", "--env", "MORE=1"]).unwrap();
        assert_eq!((request.name.as_str(), request.tag.as_deref()), ("web", Some("v2")));
        assert_eq!(request.memory_mb, Some(512));
        assert_eq!(request.steps.len(), 2);
        assert_eq!(request.steps[1].timeout_s, Some(900));
        let files: Vec<_> = request.files.iter().map(|f| (f.path.as_str(), f.mode)).collect();
        assert_eq!(files, [("/etc/motd", 0o644), ("/srv/site.py", 0o755)]);
        assert_eq!(request.files[1].content, "print('hello')\n");
        assert!(request.start.is_some() && request.ready.is_some() && request.network.is_some());
        assert_eq!(request.env.len(), 2);
        assert_eq!(request.tools, ["go@1.23.1", "nodejs@22"]);
    }

    #[test]
    fn json_is_read_too_and_mistakes_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let with = |name: &str, text: &str| {
            let file = folder.path().join(name);
            fs::write(&file, text).unwrap();
            build(&["-f", &file.display().to_string()])
        };
        let request = with("a.json", r#"{"name":"a","steps":["true"],"ready":"true"}"#).unwrap();
        assert_eq!((request.steps[0].run.as_str(), request.tag), ("true", None));
        for (text, told) in [
            ("name = \"a\"\nstep = []", "unknown field `step`"),
            ("steps = [\"true\"]", "has no name"),
            ("name = \"a\"\nfiles = [{path = \"/a\"}]", "one of `content` and `source`"),
            ("name = \"a\"\nfiles = [{path = \"/a\", content = \"\", mode = \"9\"}]", "\"0755\""),
            ("name = \"a\"\nsteps = [1]", "a command, or a table"),
        ] {
            let failure = with("a.toml", text).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{failure}");
            assert!(failure.message.contains(told), "{failure}");
        }
    }

    #[test]
    fn options_make_a_template_too() {
        let folder = tempfile::tempdir().unwrap();
        let here = folder.path().join("a");
        fs::write(&here, "text").unwrap();
        fs::set_permissions(&here, fs::Permissions::from_mode(0o750)).unwrap();
        let copy = format!("{}:/b", here.display());
        let options = ["--name", "a", "--run", "one", "--run", "two", "--copy", &copy];
        let request = build(&options).unwrap();
        assert_eq!(
            request.steps.iter().map(|s| s.run.as_str()).collect::<Vec<_>>(),
            ["one", "two"]
        );
        assert_eq!((request.files[0].path.as_str(), request.files[0].mode), ("/b", 0o750));
        assert!(build(&["--name", "a", "--copy", "here:relative"]).is_err());
    }
}
