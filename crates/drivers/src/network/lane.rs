//! Threads that live in one network namespace each and do what must be done there, one thing
//! after the other.
//!
//! A thread's namespace decides where its sockets, TAPs, `/proc/sys/net` and child processes are;
//! a task of the runtime must not change it. What was handed to a lane runs to its end, whether or
//! not whoever handed it over still waits: this is what makes the callers safe to drop.

use std::{io, os::fd::BorrowedFd, thread};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::sync::{mpsc, oneshot};

use crate::DriverError;

/// Callers wait for a place beyond this.
const QUEUE: usize = 256;

type Job = Box<dyn FnOnce() + Send>;

/// Cheap to clone. The thread ends with the last clone.
#[derive(Debug, Clone)]
pub(super) struct Lane(mpsc::Sender<Job>);

impl Lane {
    /// In `namespace`, or that of the calling thread.
    pub(super) fn spawn(
        name: &str,
        namespace: Option<BorrowedFd<'_>>,
    ) -> Result<Self, DriverError> {
        let failed = |source: io::Error| DriverError::Io {
            action: "start a thread in the network namespace".to_owned(),
            source,
        };
        let namespace = namespace.map(|fd| fd.try_clone_to_owned()).transpose().map_err(failed)?;
        let (sender, mut jobs) = mpsc::channel::<Job>(QUEUE);
        let (entered, enter) = std::sync::mpsc::sync_channel(1);
        let body = move || {
            let result = match &namespace {
                Some(fd) => move_into_link_name_space(
                    std::os::fd::AsFd::as_fd(fd),
                    Some(LinkNameSpaceType::Network),
                ),
                None => Ok(()),
            };
            drop(namespace);
            let ok = result.is_ok();
            let told = entered.send(result).is_ok();
            if ok && told {
                while let Some(job) = jobs.blocking_recv() {
                    job();
                }
            }
        };
        thread::Builder::new().name(name.to_owned()).spawn(body).map_err(failed)?;
        match enter.recv() {
            Ok(Ok(())) => Ok(Self(sender)),
            Ok(Err(errno)) => Err(failed(errno.into())),
            Err(_) => Err(ended()),
        }
    }

    /// Dropped while it waits for a place, the job does not run; later, it runs to its end.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move || {
            // The caller may have gone.
            let _ = answer.send(job());
        });
        self.0.send(job).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    }

    /// The same from a thread that may block; never from a task or from the lane itself.
    pub(super) fn call<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
    ) -> Result<T, DriverError> {
        let (answer, answered) = std::sync::mpsc::sync_channel(1);
        let job: Job = Box::new(move || {
            let _ = answer.send(job());
        });
        self.0.blocking_send(job).map_err(|_| ended())?;
        answered.recv().map_err(|_| ended())?
    }
}

/// A job panicked; the thread is gone.
fn ended() -> DriverError {
    DriverError::Io {
        action: "reach the thread in the network namespace".to_owned(),
        source: io::Error::from(io::ErrorKind::BrokenPipe),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_job_whose_caller_left_runs_to_its_end() {
        let lane = Lane::spawn("test", None).unwrap();
        let (open, gate) = std::sync::mpsc::channel::<()>();
        let (done, finished) = oneshot::channel();
        let waiting = lane.run(move || {
            gate.recv().ok();
            done.send(()).ok();
            Ok(())
        });
        // Handed over by the first poll, then dropped.
        tokio::select! {
            biased;
            _ = waiting => panic!("the gate is closed"),
            () = tokio::task::yield_now() => {}
        }
        open.send(()).unwrap();
        finished.await.unwrap();
    }
}
