//! Clients that retry: they create VMs, run commands in them and delete them, through any gateway.

use std::{sync::Arc, time::Duration};

use aether_api::{
    Accepted, CreateVm, ExecuteRequest,
    client::{CallOptions, Client, ClientError, Waited},
};
use aether_types::ErrorCode;
use tokio::sync::watch;

use super::journal::Journal;
use crate::Random;

const COMMANDS: u64 = 6;
/// Between two tries of one request.
const PAUSE: Duration = Duration::from_millis(50);
/// A request that no gateway answers for so long is not served.
const TRY_LIMIT: Duration = Duration::from_secs(10);
const TRIES_MAX: u32 = 600;

#[derive(Debug)]
pub(super) struct Load {
    pub(super) journal: Arc<Journal>,
    pub(super) gateways: Vec<Client>,
    pub(super) stop: watch::Receiver<bool>,
}

#[derive(Debug)]
enum Request {
    Create(CreateVm),
    Execute(String, ExecuteRequest),
    Delete(String),
}

impl Request {
    async fn send(&self, to: &Client, options: &CallOptions) -> Result<Accepted, ClientError> {
        match self {
            Self::Create(vm) => accepted(to.create_vm(vm, options).await?),
            Self::Execute(vm, command) => accepted(to.execute(vm, command, options).await?),
            Self::Delete(vm) => accepted(to.delete_vm(vm, options).await?),
        }
    }
}

/// What a refusal means to a client.
enum Refused {
    Again,
    /// As the VM is, it cannot be: it has failed, or its worker is lost.
    Never(Option<ErrorCode>),
}

fn refused(error: &ClientError) -> Refused {
    let ClientError::Problem(problem) = error else { return Refused::Again };
    match problem.status {
        429 | 500.. => Refused::Again,
        _ => Refused::Never(error.code()),
    }
}

impl Load {
    /// One VM after another until it is told to stop; the last one is deleted too.
    pub(super) async fn run(self, name: String, mut random: Random) {
        let mut round = 0;
        while !*self.stop.borrow() {
            round += 1;
            self.one_vm(&format!("{name}-{round}"), &mut random).await;
        }
    }

    async fn one_vm(&self, name: &str, random: &mut Random) {
        let disk_mb = Some(aether_types::limits::DISK_MB_MIN);
        let create = CreateVm { name: Some(name.to_owned()), disk_mb, ..CreateVm::default() };
        let key = format!("{name}/create");
        let created = self.ask(&key, random, &Request::Create(create)).await;
        let Some(created) = created else { return };
        let vm = created.vm_id.to_string();
        for number in 0..COMMANDS {
            let command = ExecuteRequest {
                command: "echo".into(),
                args: vec![number.to_string()],
                ..ExecuteRequest::default()
            };
            let key = format!("{name}/execute/{number}");
            let execute = Request::Execute(vm.clone(), command);
            if self.ask(&key, random, &execute).await.is_none() {
                break;
            }
        }
        let key = format!("{name}/delete");
        if self.ask(&key, random, &Request::Delete(vm.clone())).await.is_none() {
            self.journal.wrong(format!("{name} ({vm}) could not be deleted"));
        }
    }

    /// Until it is acknowledged, or refused for good.
    async fn ask(&self, key: &str, random: &mut Random, request: &Request) -> Option<Accepted> {
        let options = CallOptions { wait: None, idempotency_key: Some(key.to_owned()) };
        for _ in 0..TRIES_MAX {
            let gateway = usize::try_from(random.below(self.gateways.len() as u64)).unwrap_or(0);
            self.journal.tried();
            let answer =
                tokio::time::timeout(TRY_LIMIT, request.send(&self.gateways[gateway], &options));
            match answer.await {
                Ok(Ok(accepted)) => {
                    self.journal.acknowledged(key, accepted.task_id);
                    return Some(accepted);
                }
                Ok(Err(error)) => match refused(&error) {
                    Refused::Again => {}
                    Refused::Never(Some(ErrorCode::VmStateConflict)) => return None,
                    Refused::Never(_) => {
                        self.journal.wrong(format!("{key} is refused: {error}"));
                        return None;
                    }
                },
                Err(_) => {}
            }
            tokio::time::sleep(PAUSE).await;
        }
        self.journal.wrong(format!("{key} is answered by nobody"));
        None
    }
}

/// Nobody waited, so it is not done.
#[expect(clippy::needless_pass_by_value, reason = "an answer is taken apart")]
fn accepted<T>(answer: Waited<T, Accepted>) -> Result<Accepted, ClientError> {
    match answer {
        Waited::Accepted(accepted) => Ok(accepted),
        Waited::Done(_) => Err(ClientError::Unexpected { detail: "an end at once".into() }),
    }
}
