//! Runs a tool: text in, text out.

use std::{
    env, fs,
    io::{self, BufRead as _, BufReader, Read as _, Seek as _, Write as _},
    os::unix::{
        fs::PermissionsExt as _,
        process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use nix::{
    errno::Errno,
    sys::{
        memfd::{MFdFlags, memfd_create},
        signal::{Signal, killpg},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::Pid,
};

use crate::backends::Error;

/// Searched after PATH, which of a service often lacks them.
const SYSTEM_DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// A tool that hangs is killed after this long, and the longer the more it was given: the nft variant takes minutes for
/// 100,000 rules, and one that is killed while it works would never get done.
const LIMIT: Duration = Duration::from_secs(120);
/// Bytes of input for each second more.
const BYTES_PER_SECOND: u64 = 20_000;

/// What a tool said.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// It ended with exit code 0.
    pub success: bool,
    /// Its exit code; none after a signal.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Its standard output; empty if it was read line by line.
    pub stdout: String,
    /// Its error output.
    pub stderr: String,
}

/// Where the program called `name` is.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let is_program = |file: &PathBuf| {
        fs::metadata(file)
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    env::split_paths(&path)
        .chain(SYSTEM_DIRECTORIES.map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(is_program)
}

/// Runs `tool` with `input` as its standard input.
///
/// # Errors
/// It could not be started, or did not end in time.
pub fn run(tool: &Path, args: &[&str], input: &str) -> Result<Output, Error> {
    let more = Duration::from_secs(input.len() as u64 / BYTES_PER_SECOND);
    run_within(LIMIT + more, tool, args, input)
}

/// Runs `tool` and, if it succeeds, gives what it says to `each`, a line at a time: what 10,000 Services have in a table is
/// 16 MB of text.
///
/// # Errors
/// As for [`run`].
pub fn by_line(tool: &Path, args: &[&str], each: &mut dyn FnMut(&str)) -> Result<Output, Error> {
    let (output, said) = start_and_wait(LIMIT, tool, args, "")?;
    if output.success {
        give_lines(said, each).map_err(|cause| failed_to_run(tool, cause))?;
    }
    Ok(output)
}

fn run_within(limit: Duration, tool: &Path, args: &[&str], input: &str) -> Result<Output, Error> {
    let (output, said) = start_and_wait(limit, tool, args, input)?;
    let stdout = text(said).map_err(|cause| failed_to_run(tool, cause))?;
    Ok(Output { stdout, ..output })
}

fn failed_to_run(tool: &Path, cause: io::Error) -> Error {
    Error::Kernel {
        action: "run",
        object: tool.display().to_string(),
        cause,
        hint: "",
    }
}

/// The end of a tool, and the file with what it said. Input and output are files in memory, so that nobody waits for anybody,
/// nor for what a killed tool had started.
fn start_and_wait(
    limit: Duration,
    tool: &Path,
    args: &[&str],
    input: &str,
) -> Result<(Output, fs::File), Error> {
    let failed = |cause| failed_to_run(tool, cause);
    let stdin = match input {
        "" => Stdio::null(),
        text => Stdio::from(in_memory(text).map_err(failed)?),
    };
    let stdout = in_memory("").map_err(failed)?;
    let stderr = in_memory("").map_err(failed)?;
    let child = Command::new(tool)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(stdin)
        .stdout(stdout.try_clone().map_err(failed)?)
        .stderr(stderr.try_clone().map_err(failed)?)
        // Killed together with what it starts.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    let (status, was_late) = wait(child, limit).map_err(failed)?;
    if was_late {
        return Err(Error::Unusable(format!(
            "{} did not end within {limit:?} and was killed; the rules are read again, then it is tried again",
            tool.display()
        )));
    }
    let output = Output {
        success: status.success(),
        code: status.code(),
        signal: status.signal(),
        stdout: String::new(),
        stderr: text(stderr).map_err(failed)?,
    };
    Ok((output, stdout))
}

/// Waits for the end of a process, which leads a group; kills the group when it takes too long. Says whether it did.
fn wait(mut child: Child, limit: Duration) -> io::Result<(ExitStatus, bool)> {
    let pid = Pid::from_raw(child.id().cast_signed());
    let (end, ended) = channel::<()>();
    let was_late = thread::scope(|scope| {
        let watchdog = scope.spawn(move || {
            let is_late = ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            // The process is not reaped yet, so this is its number still; it may have ended just now.
            is_late && killpg(pid, Signal::SIGKILL).is_ok()
        });
        let without_reaping = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while waitid(Id::Pid(pid), without_reaping) == Err(Errno::EINTR) {}
        drop(end);
        watchdog.join().unwrap_or(false)
    });
    Ok((child.wait()?, was_late))
}

fn text(mut file: fs::File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

fn give_lines(mut file: fs::File, each: &mut dyn FnMut(&str)) -> io::Result<()> {
    file.rewind()?;
    let mut reader = BufReader::new(file);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        each(String::from_utf8_lossy(&line).trim_end_matches('\n'));
        line.clear();
    }
    Ok(())
}

fn in_memory(text: &str) -> io::Result<fs::File> {
    let mut file = fs::File::from(memfd_create(c"proxy-agent-rules", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file)
}

/// The error of a tool that did not do what it was asked for.
pub fn failed(tool: &Path, output: &Output) -> Error {
    let said = output.stderr.trim();
    let end = end(output);
    Error::Unusable(format!("{} ended with {end}: {said}", tool.display()))
}

/// How it ended: "exit code 3", "signal 9".
pub fn end(output: &Output) -> String {
    match (output.code, output.signal) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "neither an exit code nor a signal".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn shell(limit: Duration, script: &str, input: &str) -> Result<Output, Error> {
        run_within(limit, Path::new("/bin/sh"), &["-c", script], input)
    }

    #[test]
    fn a_tool_reads_and_writes_more_than_a_pipe_holds() {
        let input = "x".repeat(1 << 20);
        let output = shell(LIMIT, "cat; echo no >&2; exit 3", &input).unwrap();
        assert!(output.stdout == input && output.stderr == "no\n");
        assert!(!output.success && end(&output) == "exit code 3");
    }

    #[test]
    fn what_a_tool_says_is_given_line_by_line_if_it_succeeds() {
        let lines_of = |script: &str| {
            let mut lines = Vec::new();
            let mut each = |line: &str| lines.push(line.to_owned());
            let output = by_line(Path::new("/bin/sh"), &["-c", script], &mut each).unwrap();
            (output.success, lines)
        };
        let expected = ["one ", "", "t\u{fffd}o"].map(str::to_owned).to_vec();
        assert_eq!(lines_of(r"printf 'one \n\nt\377o'"), (true, expected));
        assert_eq!(lines_of("echo one; exit 1"), (false, Vec::new()));
    }

    #[test]
    fn the_signal_that_ended_a_tool_is_told() {
        let output = shell(LIMIT, "kill -SEGV $$", "").unwrap();
        assert_eq!(end(&output), "signal 11");
    }

    #[test]
    fn a_tool_that_hangs_is_killed_with_what_it_started() {
        let start = Instant::now();
        let limit = Duration::from_millis(100);
        let error = shell(limit, "sleep 600 & wait", "").unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(60));
        let said = "/bin/sh did not end within 100ms and was killed";
        assert!(error.to_string().contains(said), "{error}");
    }
}
