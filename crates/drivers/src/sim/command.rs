//! The programs of a simulated guest: enough to try everything that can happen to a command.
//!
//! `true`, `false`, `exit N`, `echo`, `cat [FILE]`, `sleep SECONDS`, `yes [BYTES]`, `spew BYTES`,
//! `count SECONDS`, `env`, `pwd`, `hostname`, `id`, `tee FILE`, `sync`, `reboot`, `poweroff`, and `sh -c SCRIPT`
//! with `;`, `&&`, `||`, quotes, `$NAME`, `> FILE`, `>> FILE` and `>&2`. Anything else is not
//! found.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;

use super::{
    files::Refusal,
    guest::Guest,
    output::OutputStream,
    run::{Progress, Run},
};

/// Output of one simulated write; a pipe's size.
const CHUNK_BYTES: usize = 64 * 1024;
/// Nested `sh -c`.
const DEPTH_MAX: usize = 8;

/// Where a program's standard output goes.
#[derive(Debug, Clone)]
enum Sink {
    Stdout,
    Stderr,
    File { path: String, append: bool },
}

/// What programs of one run share.
pub(super) struct Shell {
    guest: Arc<Guest>,
    run: Arc<Run>,
    resumption: Mutex<Resumption>,
}

/// What a run that comes from a snapshot has still to skip.
#[derive(Default)]
struct Resumption {
    /// Of each script, the outermost first, until it is reached.
    frames: Vec<(usize, i32)>,
    /// Of the innermost program's output.
    bytes: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shell {
    /// For a run that begins, or goes on from its progress.
    pub(super) fn new(guest: Arc<Guest>, run: Arc<Run>) -> Self {
        let Progress { frames, bytes, .. } = lock(&run.progress).clone();
        Self { guest, run, resumption: Mutex::new(Resumption { frames, bytes }) }
    }

    /// Runs the program and gives its exit code.
    pub(super) async fn run(&self) -> i32 {
        self.program(&self.run.program.words, &Sink::Stdout, 0).await
    }

    async fn program(&self, words: &[String], sink: &Sink, depth: usize) -> i32 {
        let Some((name, args)) = words.split_first() else { return 0 };
        let name = name.rsplit('/').next().unwrap_or(name);
        let first = args.first().map(String::as_str);
        match name {
            "true" | "sync" | ":" => 0,
            "false" => 1,
            "exit" => first.and_then(|code| code.parse::<u8>().ok()).map_or(2, i32::from),
            "echo" => self.print(sink, format!("{}\n", args.join(" ")).as_bytes()).await,
            "cat" => self.cat(args, sink).await,
            "tee" => self.tee(first, sink).await,
            "sleep" => self.sleep(first).await,
            "count" => self.count(sink, first).await,
            "yes" => self.fill(sink, first.and_then(|n| n.parse().ok()), |i| b"y\n"[i % 2]).await,
            "spew" => match first.and_then(|n| n.parse().ok()) {
                Some(bytes) => self.fill(sink, Some(bytes), pattern).await,
                None => self.complain("spew: wants a number of bytes", 2).await,
            },
            "env" => {
                let lines: Vec<_> =
                    self.run.program.env.iter().map(|(k, v)| format!("{k}={v}\n")).collect();
                self.print(sink, lines.concat().as_bytes()).await
            }
            "pwd" => self.print(sink, format!("{}\n", self.run.program.cwd).as_bytes()).await,
            "hostname" => self.print(sink, format!("{}\n", self.guest.hostname()).as_bytes()).await,
            "id" => self.print(sink, b"uid=0(root) gid=0(root)\n").await,
            "stty" => {
                let size = self.run.tty_size();
                self.print(sink, format!("{} {}\n", size.rows, size.cols).as_bytes()).await
            }
            "reboot" | "poweroff" => {
                self.guest.shut_down();
                std::future::pending().await
            }
            "sh" | "bash" if matches!(first, Some("-c" | "-ec")) && depth < DEPTH_MAX => {
                let script = args.get(1).map_or("", String::as_str);
                Box::pin(self.script(script, sink, depth + 1)).await
            }
            _ => self.complain(&format!("{name}: command not found"), 127).await,
        }
    }

    async fn script(&self, script: &str, sink: &Sink, depth: usize) -> i32 {
        let resumed = lock(&self.resumption).frames.get(depth - 1).copied();
        let (first, mut status) = resumed.unwrap_or_default();
        let mut is_resumed = resumed.is_some();
        let steps = parse(script, &self.run.program.env);
        for (at, Step { joint, words, redirect }) in steps.into_iter().enumerate().skip(first) {
            let runs = match joint {
                Joint::Always => true,
                Joint::IfOk => status == 0,
                Joint::IfFailed => status != 0,
            };
            if !runs {
                continue;
            }
            let sink = redirect.as_ref().unwrap_or(sink);
            if !std::mem::take(&mut is_resumed)
                && let Err(refusal) = self.begin_step(depth - 1, at, status, sink).await
            {
                status = self.complain(&format!("sh: {}", refusal.message), 1).await;
                continue;
            }
            status = self.program(&words, sink, depth).await;
            if words.first().is_some_and(|w| w == "exit") {
                break;
            }
        }
        status
    }

    async fn begin_step(
        &self,
        frame: usize,
        step: usize,
        status: i32,
        sink: &Sink,
    ) -> Result<(), Refusal> {
        let begin = || {
            *lock(&self.resumption) = Resumption::default();
            let mut progress = lock(&self.run.progress);
            progress.frames.truncate(frame);
            progress.frames.push((step, status));
            (progress.bytes, progress.wake_at) = (0, None);
            self.truncate(sink)
        };
        self.guest.effect(begin).await
    }

    fn truncate(&self, sink: &Sink) -> Result<(), Refusal> {
        match sink {
            Sink::File { path, append: false } if !path.starts_with("/proc/") => {
                self.guest.disk().write(path, b"", None, false, false)
            }
            Sink::File { .. } | Sink::Stdout | Sink::Stderr => Ok(()),
        }
    }

    async fn print(&self, sink: &Sink, data: &[u8]) -> i32 {
        let data = self.not_yet_written(data);
        match sink {
            Sink::Stdout => self.write(&self.run.stdout, data).await,
            Sink::Stderr => self.write(&self.run.stderr, data).await,
            Sink::File { path, .. } if path == "/proc/sysrq-trigger" => match data.first() {
                Some(b'c') => {
                    self.guest.panic();
                    std::future::pending::<()>().await;
                }
                Some(b'b') => {
                    self.guest.shut_down();
                    std::future::pending::<()>().await;
                }
                Some(_) | None => {}
            },
            Sink::File { path, .. } => {
                let write = || {
                    self.guest.disk().write(path, data, None, true, false)?;
                    lock(&self.run.progress).bytes += data.len() as u64;
                    Ok(())
                };
                let written: Result<(), Refusal> = self.guest.effect(write).await;
                if let Err(refusal) = written {
                    return self.complain(&format!("write error: {}", refusal.message), 1).await;
                }
            }
        }
        0
    }

    /// What is left of output that a program makes again because it comes from a snapshot.
    fn not_yet_written<'a>(&self, data: &'a [u8]) -> &'a [u8] {
        let skip = &mut lock(&self.resumption).bytes;
        let skipped = usize::try_from(*skip).unwrap_or(usize::MAX).min(data.len());
        *skip -= skipped as u64;
        &data[skipped..]
    }

    /// Appends all of `data`, waiting for room where there is none.
    async fn write(&self, stream: &OutputStream, mut data: &[u8]) {
        while !data.is_empty() {
            let room = stream.room();
            let push = || {
                let rest = stream.push(data);
                lock(&self.run.progress).bytes += (data.len() - rest.len()) as u64;
                rest
            };
            data = self.guest.effect(push).await;
            self.run.grown.notify_waiters();
            if !data.is_empty() {
                room.await;
            }
        }
    }

    async fn complain(&self, text: &str, code: i32) -> i32 {
        let text = format!("{text}\n");
        self.write(&self.run.stderr, self.not_yet_written(text.as_bytes())).await;
        code
    }

    async fn cat(&self, files: &[String], sink: &Sink) -> i32 {
        if files.is_empty() {
            while let Some(data) = self.run.stdin.next().await {
                let code = self.print(sink, &data).await;
                if code != 0 {
                    return code;
                }
                self.input_taken().await;
            }
            return 0;
        }
        for file in files {
            let read = self.guest.disk().read(file);
            let code = match read {
                Ok(data) => self.print(sink, &data).await,
                Err(refusal) => self.complain(&format!("cat: {}", refusal.message), 1).await,
            };
            if code != 0 {
                return code;
            }
        }
        0
    }

    async fn tee(&self, file: Option<&str>, sink: &Sink) -> i32 {
        let Some(path) = file else { return self.cat(&[], sink).await };
        let file = Sink::File { path: path.to_owned(), append: true };
        while let Some(data) = self.run.stdin.next().await {
            for sink in [sink, &file] {
                let code = self.print(sink, &data).await;
                if code != 0 {
                    return code;
                }
            }
            self.input_taken().await;
        }
        0
    }

    /// What a piece of input led to is written.
    async fn input_taken(&self) {
        let take = || {
            self.run.stdin.take();
            lock(&self.run.progress).bytes = 0;
        };
        self.guest.effect(take).await;
        // The session tells the host that there is room.
        self.run.grown.notify_waiters();
    }

    async fn sleep(&self, seconds: Option<&str>) -> i32 {
        match seconds.and_then(parse_seconds) {
            Some(duration) => {
                self.rest(duration).await;
                0
            }
            None => self.complain("sleep: wants a number of seconds", 1).await,
        }
    }

    /// Does nothing for a time, part of which may lie before a snapshot.
    async fn rest(&self, duration: Duration) {
        let begin = || {
            let wake_at = self.guest.now().saturating_add(duration);
            *lock(&self.run.progress).wake_at.get_or_insert(wake_at)
        };
        let wake_at = self.guest.effect(begin).await;
        self.guest.sleep_until(wake_at).await;
        self.guest.effect(|| lock(&self.run.progress).wake_at = None).await;
    }

    /// Prints 1, 2, 3 and so on, with a rest after each.
    async fn count(&self, sink: &Sink, seconds: Option<&str>) -> i32 {
        let Some(pace) = seconds.and_then(parse_seconds) else {
            return self.complain("count: wants a number of seconds", 1).await;
        };
        for number in 1_u64.. {
            let code = self.print(sink, format!("{number}\n").as_bytes()).await;
            if code != 0 {
                return code;
            }
            // Where a snapshot's clone counts again what was counted before, it does so at once.
            if lock(&self.resumption).bytes == 0 {
                self.rest(pace).await;
            }
        }
        0
    }

    /// Writes `bytes` bytes (without end where `None`), the one at `i` being `byte(i)`.
    async fn fill(&self, sink: &Sink, bytes: Option<usize>, byte: fn(usize) -> u8) -> i32 {
        let mut written = 0;
        while bytes.is_none_or(|bytes| written < bytes) {
            let left = bytes.map_or(CHUNK_BYTES, |bytes| (bytes - written).min(CHUNK_BYTES));
            let chunk: Vec<u8> = (written..written + left).map(byte).collect();
            let code = self.print(sink, &chunk).await;
            if code != 0 {
                return code;
            }
            written += left;
            // An endless writer lets others run.
            tokio::task::yield_now().await;
        }
        0
    }
}

fn parse_seconds(text: &str) -> Option<Duration> {
    match text {
        "infinity" => Some(Duration::from_secs(u64::from(u32::MAX))),
        text => text.parse().ok().and_then(|s: f64| Duration::try_from_secs_f64(s).ok()),
    }
}

/// Byte `i` of what `spew` prints: every value, and no period that a block size divides.
pub(super) fn pattern(i: usize) -> u8 {
    u8::try_from(i % 251).unwrap_or(0)
}

enum Joint {
    Always,
    IfOk,
    IfFailed,
}

struct Step {
    joint: Joint,
    words: Vec<String>,
    redirect: Option<Sink>,
}

/// Splits a script into steps. What it does not understand it takes as words.
fn parse(script: &str, env: &BTreeMap<String, String>) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut joint = Joint::Always;
    let mut words: Vec<String> = Vec::new();
    let mut word: Option<String> = None;
    let mut chars = script.chars().peekable();
    let mut finish =
        |words: &mut Vec<String>, word: &mut Option<String>, joint: &mut Joint, next: Joint| {
            words.extend(word.take());
            let joint = std::mem::replace(joint, next);
            if !words.is_empty() {
                let (words, redirect) = redirected(std::mem::take(words));
                steps.push(Step { joint, words, redirect });
            }
        };
    while let Some(c) = chars.next() {
        match c {
            '\'' => {
                let text = word.get_or_insert_default();
                text.extend(chars.by_ref().take_while(|c| *c != '\''));
            }
            '"' => {
                let inner: String = chars.by_ref().take_while(|c| *c != '"').collect();
                word.get_or_insert_default().push_str(&expand(&inner, env));
            }
            ';' | '\n' => finish(&mut words, &mut word, &mut joint, Joint::Always),
            '&' if chars.peek() == Some(&'&') && word.as_deref() != Some(">") => {
                chars.next();
                finish(&mut words, &mut word, &mut joint, Joint::IfOk);
            }
            '|' if chars.peek() == Some(&'|') => {
                chars.next();
                finish(&mut words, &mut word, &mut joint, Joint::IfFailed);
            }
            c if c.is_whitespace() => words.extend(word.take()),
            '$' => {
                let mut name = String::from("$");
                while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
                    name.push(c);
                }
                word.get_or_insert_default().push_str(&expand(&name, env));
            }
            c => word.get_or_insert_default().push(c),
        }
    }
    finish(&mut words, &mut word, &mut joint, Joint::Always);
    steps
}

fn expand(text: &str, env: &BTreeMap<String, String>) -> String {
    let mut parts = text.split('$');
    let mut out = parts.next().unwrap_or("").to_owned();
    for part in parts {
        let end =
            part.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(part.len());
        if end == 0 {
            out.push('$');
        }
        out.push_str(env.get(&part[..end]).map_or("", String::as_str));
        out.push_str(&part[end..]);
    }
    out
}

fn redirected(words: Vec<String>) -> (Vec<String>, Option<Sink>) {
    let mut left = Vec::new();
    let mut redirect = None;
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let (append, target) = match (word.strip_prefix(">>"), word.strip_prefix('>')) {
            (Some(target), _) => (true, target),
            (None, Some(target)) => (false, target),
            (None, None) if word == "1>&2" => (false, "&2"),
            (None, None) => {
                left.push(word);
                continue;
            }
        };
        let target =
            if target.is_empty() { words.next().unwrap_or_default() } else { target.to_owned() };
        redirect = Some(match target.as_str() {
            "&2" => Sink::Stderr,
            _ => Sink::File { path: target, append },
        });
    }
    (left, redirect)
}

/// Bytes as the run's standard input gives them.
pub(super) type Input = Option<Bytes>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_split_as_a_shell_does() {
        let env = BTreeMap::from([("NAME".to_owned(), "v w".to_owned())]);
        let steps = parse("echo 'a b' \"c $NAME\" >&2; false && x || exit 3\ncat >/f", &env);
        let words: Vec<_> = steps.iter().map(|s| s.words.join("|")).collect();
        assert_eq!(words, ["echo|a b|c v w", "false", "x", "exit|3", "cat"]);
        assert!(matches!(steps[0].redirect, Some(Sink::Stderr)));
        assert!(matches!(steps[2].joint, Joint::IfOk));
        assert!(matches!(steps[3].joint, Joint::IfFailed));
        assert!(
            matches!(&steps[4].redirect, Some(Sink::File { path, append: false }) if path == "/f")
        );
    }
}
