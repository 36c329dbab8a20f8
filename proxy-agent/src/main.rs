//! The agent's process: arguments in, one line of error and an exit code out.

use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
};

use proxy_agent::{
    cli::{self, Cli, Command, Global, Instead, LogFormat, Run},
    config, daemon, debug,
};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // Nobody reads: nothing more to say.
            let _ = error.print();
            return if error.use_stderr() {
                ExitCode::from(cli::USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "proxy-agent: {error:#}");
            ExitCode::from(cli::FAILURE)
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let (cli, notes) = config::settle(cli)?;
    let Cli {
        global,
        command,
        given: _,
    } = &cli;
    log_to_stderr(global)?;
    for note in notes {
        tracing::warn!("{note}");
    }
    Ok(match command {
        Command::Run(run) => {
            run_or_instead(global, run)?;
            ExitCode::SUCCESS
        }
        Command::Dump(dump) => debug::dump(global, dump)?,
        Command::Explain(explain) => debug::explain(global, explain)?,
        Command::Check(check) => debug::check(global, check)?,
        Command::Plan(plan) => debug::plan(global, plan)?,
        Command::Cleanup(cleanup) => debug::cleanup(global, cleanup)?,
        Command::SelfTest { cgroup } => {
            daemon::self_test::connect_from(cgroup.as_deref()).map_err(anyhow::Error::msg)?;
            ExitCode::SUCCESS
        }
        Command::Reap => {
            daemon::reaper::run(&global.bpf_dir).map_err(anyhow::Error::msg)?;
            ExitCode::SUCCESS
        }
    })
}

fn run_or_instead(global: &Global, run: &Run) -> anyhow::Result<()> {
    let Instead {
        write_config_to,
        cleanup,
        init_only,
    } = &run.instead;
    if let Some(file) = write_config_to {
        config::write(global, run, file)?;
        tracing::info!(file = %file.display(), "wrote the configuration");
    } else if *cleanup {
        debug::cleanup_everything(global)?;
    } else if *init_only {
        daemon::initialise(global, run)?;
    } else {
        daemon::run(global, run)?;
    }
    Ok(())
}

/// What fails at the API server the source tells once; its client would at every try.
const CLIENT: &str = "kube_client=off,kube_runtime=off";

/// Logs what `--log-level` or RUST_LOG ask for, by default what an operator wants to know.
fn log_to_stderr(global: &Global) -> anyhow::Result<()> {
    // As in kube-proxy: 0 to 3 are what an operator wants to know.
    let by_verbosity = match global.verbosity.unwrap_or_default() {
        0..4 => None,
        4..6 => Some("debug"),
        6.. => Some("trace"),
    };
    let asked = global.log_level.as_deref().or(by_verbosity);
    let filter = match asked {
        // A bare level is about us: at debug, the eBPF loader alone writes hundreds of lines.
        Some(level) if level.parse::<LevelFilter>().is_ok() => {
            EnvFilter::new(format!("warn,{CLIENT},proxy_agent={level}"))
        }
        Some(filter) => EnvFilter::try_new(filter)
            .map_err(|error| anyhow::anyhow!("--log-level {filter}: {error}"))?,
        None => EnvFilter::try_from_default_env()
            .unwrap_or_else(|_| EnvFilter::new(format!("info,{CLIENT}"))),
    };
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match global.log_format {
        LogFormat::Text => logs.with_target(false).init(),
        LogFormat::Json => logs.json().flatten_event(true).init(),
    }
    Ok(())
}
