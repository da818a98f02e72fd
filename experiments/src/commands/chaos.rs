//! `sanderling chaos`: processes that are killed, and what is left of the run.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::{UsageError, say};
use crate::chaos::{Report, SERVER_KILLS, Soak, soak};
use crate::relay::{Conditions, Counts};
use crate::work::Stop;

/// A model that is small enough for many exchanges, and a run that does not end before the soak does.
const RUN: &str = "\
[run]
name = 'chaos'
[data]
batch_size = 8
[model]
hidden_size = 64
layers = 2
heads = 4
kv_heads = 2
intermediate_size = 64
experts = 4
context = 64
[training]
steps = 100000000
eval_every = 5000
warmup_steps = 100
[exchange]
replica_check_every = 5
[server]
lease_ms = 20000
checkpoint_every_ms = 5000
keep_journal = true
";

/// Kill servers and workers while they train, and verify what is left
///
/// Starts a server with a state folder and workers as processes of their own, and kills one after the other with
/// `kill -9`, the server at least 20 times in ten minutes; each is started again at once. Every other worker keeps its
/// place on disk. In the end the server is asked to stop, and its last checkpoint (the model, the workers' replicas, the
/// sessions and their stored answers) is compared, bit for bit, with what the whole journal makes; and in the journal
/// every session's pushes must be consecutive, every batch done once, what workers that keep
/// their place knew to be acknowledged there, and the loss lower than at the beginning.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  sanderling chaos --minutes 10
  sanderling chaos --minutes 1 --workers 3 --kill-every-s 2 --out /tmp/chaos
  sanderling chaos --minutes 2 --relay       # over a bad network as well
  jq .findings runs/chaos/chaos.json         # what the journal and the last checkpoint say")]
pub struct Arguments {
    /// How long processes are killed for; verifying comes after that
    #[arg(long, default_value_t = 10.0, value_name = "MINUTES")]
    minutes: f64,
    /// Worker processes
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    workers: u32,
    /// A worker is killed about this often, seconds
    #[arg(long, default_value_t = 3.0, value_name = "SECONDS")]
    kill_every_s: f64,
    /// Put a bad network between workers and server: it loses 2 % of the datagrams, doubles 1 %, holds 2 % back, delays
    /// each by 2 to 6 ms, changes the workers' ports every few seconds, and cuts everybody off now and then
    #[arg(long)]
    relay: bool,
    /// Decides whom to kill when
    #[arg(long, default_value_t = 1, value_name = "SEED")]
    seed: u64,
    /// Where state, logs and `chaos.json` go; there must be no soak yet
    #[arg(long, default_value = "runs/chaos", value_name = "DIR")]
    out: PathBuf,
}

/// Runs the command.
///
/// # Errors
/// What did not hold, as a sentence.
pub fn chaos(arguments: &Arguments) -> anyhow::Result<()> {
    let positive = |name: &str, value: f64, unit: f64| match Duration::try_from_secs_f64(value * unit) {
        Ok(duration) if duration >= Duration::from_millis(100) => Ok(duration),
        _ => Err(UsageError(format!("--{name} {value} is too short, or no time"))),
    };
    let folder = std::path::absolute(&arguments.out)?;
    let plan = Soak {
        duration: positive("minutes", arguments.minutes, 60.0)?,
        workers: arguments.workers as usize,
        seed: arguments.seed,
        kill_every: positive("kill-every-s", arguments.kill_every_s, 1.0)?,
        folder,
        run: RUN.to_owned(),
        network: arguments.relay.then_some(Conditions {
            loss: 0.02,
            duplicates: 0.01,
            reordering: 0.02,
            delay: Duration::from_millis(2),
            jitter: Duration::from_millis(4),
            ..Conditions::default()
        }),
    };
    let stop = Stop::listen()?;
    let bar = ProgressBar::new(plan.duration.as_secs());
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} s  {msg}").expect("the template is valid");
    bar.set_style(style);
    bar.println(format!(
        "seed {}; at most {SERVER_KILLS} times the server; everything is in {}",
        plan.seed,
        plan.folder.display()
    ));
    let begun = Instant::now();
    let is_stopped = || {
        bar.set_position(begun.elapsed().as_secs().min(plan.duration.as_secs()));
        stop.is_asked()
    };
    let outcome = soak(&plan, &is_stopped, &mut |event| bar.set_message(event.to_owned()));
    bar.finish_and_clear();
    let report = outcome?;
    say(&closing_table(&report))
}

fn closing_table(report: &Report) -> String {
    let Report { findings, ready_seconds, .. } = report;
    let again = ready_seconds.get(1..).unwrap_or_default();
    let longest = again.iter().copied().fold(0.0, f64::max);
    let mean = again.iter().sum::<f64>() / again.len().max(1) as f64;
    let mut rows = vec![
        ("soak", format!("{:.0} s, seed {}", report.seconds, report.seed)),
        (
            "server killed",
            format!("{} times; ready again after {mean:.2} s, {longest:.2} s at most", report.server_kills),
        ),
        (
            "workers killed",
            format!("{} times, {} of them keeping their place", report.worker_kills, report.place_kills),
        ),
        ("sessions", findings.sessions.to_string()),
        (
            "acknowledged",
            format!("what workers knew of {} times they ended is in the journal", findings.places),
        ),
        ("pushes", format!("{}, each applied once; {} updates", findings.pushes, findings.steps)),
        (
            "verified",
            format!(
                "model and {} replicas at record {} of {} are what the journal makes, bit for bit ({:.1} s)",
                findings.replicas, findings.checkpoint, findings.records, findings.replay_seconds
            ),
        ),
        (
            "loss",
            format!("{:.4} in the first tenth, {:.4} in the last", findings.first_loss, findings.last_loss),
        ),
    ];
    if let Some(network) = &report.network {
        let Counts { forwarded, lost, duplicated, held_back, cut_off, rebinds, .. } = network;
        let value = format!(
            "{forwarded} datagrams passed, {lost} lost, {duplicated} doubled, {held_back} held back, {cut_off} cut off; {rebinds} \
             ports changed"
        );
        rows.insert(3, ("network", value));
    }
    rows.iter().map(|(name, value)| format!("{name:>15}  {value}\n")).collect()
}
