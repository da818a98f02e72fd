//! Ctrl-C and the request to end that service managers and containers send.

use tokio::sync::watch;

/// The exit code of a process ended by Ctrl-C (128 + SIGINT).
const INTERRUPTED: i32 = 130;

/// Becomes true with the first Ctrl-C or SIGTERM, after which `notice` was called; the second ends the process.
///
/// # Panics
/// Outside a tokio runtime.
pub fn stop_on_interrupt(notice: impl FnOnce() + Send + 'static) -> watch::Receiver<bool> {
    let (stop, stopped) = watch::channel(false);
    tokio::spawn(async move {
        interrupt().await;
        notice();
        stop.send_replace(true);
        interrupt().await;
        std::process::exit(INTERRUPTED);
    });
    stopped
}

/// Waits for one signal. Where the system offers none, that is for ever.
async fn interrupt() {
    let pressed = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = pressed => {}
        () = terminated() => {}
    }
}

#[cfg(unix)]
async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut signals) => drop(signals.recv().await),
        Err(_) => std::future::pending().await,
    }
}

#[cfg(not(unix))]
async fn terminated() {
    std::future::pending().await
}
