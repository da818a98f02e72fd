//! Ctrl-C and the request to end that service managers and containers send.

#[cfg(unix)]
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

/// The exit code of a process ended by Ctrl-C (128 + SIGINT).
const INTERRUPTED: i32 = 130;

/// Becomes true with the first Ctrl-C or SIGTERM, after which `notice` was called; the second ends the process, and so
/// does the first when nobody holds the receiver any more. Signals are caught from the return of this function until the
/// runtime is dropped, which is therefore to outlive whatever a signal shall end.
///
/// # Panics
/// Outside a tokio runtime.
pub fn stop_on_interrupt(notice: impl FnOnce() + Send + 'static) -> watch::Receiver<bool> {
    let (stop, stopped) = watch::channel(false);
    let mut signals = Signals::catch();
    tokio::spawn(async move {
        signals.next().await;
        if stop.is_closed() {
            std::process::exit(INTERRUPTED);
        }
        notice();
        stop.send_replace(true);
        signals.next().await;
        std::process::exit(INTERRUPTED);
    });
    stopped
}

/// The signals that end a program. Where the system has none to offer, they never come.
#[cfg(unix)]
struct Signals {
    interrupt: Option<Signal>,
    terminate: Option<Signal>,
}

#[cfg(unix)]
impl Signals {
    fn catch() -> Self {
        let catch = |kind| signal(kind).ok();
        Self { interrupt: catch(SignalKind::interrupt()), terminate: catch(SignalKind::terminate()) }
    }

    async fn next(&mut self) {
        async fn next(signals: &mut Option<Signal>) {
            match signals {
                Some(signals) => drop(signals.recv().await),
                None => std::future::pending().await,
            }
        }
        tokio::select! {
            () = next(&mut self.interrupt) => {}
            () = next(&mut self.terminate) => {}
        }
    }
}

/// Ctrl-C. Where the system has none to offer, it never comes.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn catch() -> Self {
        Self
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
