use std::path::{Path, PathBuf};
use std::time::Duration;

use selvedge_cluster::ProposeError;
use selvedge_domain::{Actor, Asker, Body, Credential, Id, RejectedCode};

use crate::brokers::{PATIENCE, Setup, leader_of, token, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_write_through_any_broker_is_seen_by_all_and_by_its_writer_at_once() {
    let brokers = Setup::new().voters(3).await;
    for (at, broker) in brokers.iter().enumerate() {
        let name = format!("token-{at}");
        broker.create_token(&name).await.unwrap();
        assert!(broker.has_token(&name), "the writer reads its own write");
        for other in &brokers {
            let state = other.cluster.linearizable(PATIENCE).await.unwrap();
            assert!(crate::brokers::has_token(&state, &name));
        }
    }
    let hashes: Vec<_> = brokers.iter().map(|broker| broker.cluster.status().state_hash).collect();
    assert_eq!(hashes[0], hashes[1]);
    assert_eq!(hashes[1], hashes[2]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_a_committed_answer_on_every_broker() {
    let brokers = Setup::new().voters(3).await;
    brokers[0].create_token("twice").await.unwrap();
    for broker in &brokers {
        match broker.create_token("twice").await {
            Err(ProposeError::Refused(rejected)) => assert_eq!(rejected.code, RejectedCode::Conflict),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_is_applied_once_whoever_retries() {
    let brokers = Setup::new().voters(3).await;
    let owner = brokers[0].owner();
    let first = brokers[0].cluster.propose(owner.clone(), token("once"), Some([9; 32])).await.unwrap();
    for broker in &brokers {
        let again = broker.cluster.propose(owner.clone(), token("once"), Some([9; 32])).await.unwrap();
        assert_eq!(again, first);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_leads_when_the_leader_dies_and_nothing_acknowledged_is_lost() {
    let setup = Setup::new();
    let mut brokers = setup.voters(3).await;
    let leader = leader_of(&brokers).await;
    brokers[leader].create_token("before").await.unwrap();
    let dead = brokers.swap_remove(leader);
    dead.cluster.stop().await;
    // Retried inside until another leads.
    brokers[0].create_token("after").await.unwrap();
    brokers[1].create_token("after too").await.unwrap();
    for broker in &brokers {
        let state = broker.cluster.linearizable(PATIENCE).await.unwrap();
        for name in ["before", "after", "after too"] {
            assert!(crate::brokers::has_token(&state, name), "{name}");
        }
    }
    let back = dead.restart(&setup).await;
    until("the restarted broker has caught up", || back.has_token("after too")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_writers_over_a_leader_change_apply_each_command_once() {
    let brokers = Setup::new().voters(3).await;
    let leader = leader_of(&brokers).await;
    let mut writers = Vec::new();
    for (at, broker) in brokers.iter().enumerate() {
        for n in 0..40 {
            let (cluster, owner) = (broker.cluster.clone(), broker.owner());
            writers.push(tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(n * 10)).await;
                let name = format!("token-{at}-{n}");
                cluster.propose(owner, token(&name), None).await.map(|done| (name, done.ids[0]))
            }));
        }
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    brokers[leader].cluster.hand_over(None).await.unwrap();
    let mut made = Vec::new();
    for writer in writers {
        // A command that was applied twice would be answered by a conflict.
        made.push(writer.await.unwrap().unwrap());
    }
    let state = brokers[0].cluster.linearizable(PATIENCE).await.unwrap();
    for (name, id) in made {
        let token = state.by_id::<selvedge_domain::rows::Token>(id).unwrap();
        assert_eq!(token.name, name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_from_disk_keeps_everything() {
    let setup = Setup::new();
    let broker = setup.first().await;
    broker.create_token("kept").await.unwrap();
    let before = broker.cluster.status();
    let broker = broker.restart(&setup).await;
    until("it has applied all that it had", || broker.has_token("kept")).await;
    until("it leads again", || broker.cluster.leads()).await;
    assert_eq!(broker.cluster.status().position, before.position);
    broker.create_token("more").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_initialised_once() {
    let setup = Setup::new();
    let first = setup.first().await;
    let again = first.cluster.initialize(crate::brokers::init(setup.cluster_id)).await;
    assert!(again.unwrap_err().to_string().contains("initialised before"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_looks_at_the_credential_itself() {
    let brokers = Setup::new().voters(3).await;
    let leader = leader_of(&brokers).await;
    let owner = brokers[0].owner();
    let other = brokers[0].create_token("other").await.unwrap();
    let askers = [
        ("nothing was shown", Asker { actor: owner.actor.clone(), credential: None }),
        ("an unknown secret", Asker::holder(owner.actor.clone(), Credential::new("guessed"))),
        ("somebody else's secret", Asker::holder(owner.actor.clone(), Credential::new("other"))),
        ("somebody else's name", Asker::holder(Actor::token(other, 1), owner.credential.clone().unwrap())),
        (
            "a later generation",
            Asker::holder(Actor::token(owner.actor.id.unwrap(), 2), owner.credential.clone().unwrap()),
        ),
        ("a directory that is not there", Asker::holder(Actor::directory(Id::new(1, 1), 1), Credential::new("other"))),
    ];
    let before = brokers[leader].cluster.status().position;
    for (at, broker) in brokers.iter().enumerate() {
        for (what, asker) in &askers {
            match broker.cluster.propose(asker.clone(), token("forged"), None).await {
                Err(ProposeError::Refused(refused)) => {
                    assert_eq!(refused.code, RejectedCode::Unauthenticated, "{what}, through broker {at}");
                }
                other => panic!("{what}, through broker {at}: {other:?}"),
            }
        }
    }
    assert_eq!(brokers[leader].cluster.status().position, before, "nothing of it is in the journal");
    brokers[0].cluster.propose(owner, token("true"), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_reaches_the_log() {
    let setup = Setup::new();
    let broker = setup.first().await;
    let secret = "svt_a-secret-that-is-easy-to-find";
    let body = Body::CreateToken { name: "auditor".into(), role: 1, secret_sha256: Credential::new(secret).sha256() };
    broker.cluster.propose(broker.owner(), body, None).await.unwrap();
    let credential = Credential::new(secret);
    let asker = Asker::holder(credential.actor(&broker.cluster.state()).unwrap(), credential);
    // Its role does not allow it: also a refusal is in the log.
    let refused = broker.cluster.propose(asker, token("a-name-that-is-easy-to-find"), None).await.unwrap_err();
    assert!(matches!(refused, ProposeError::Refused(refused) if refused.code == RejectedCode::Forbidden));
    broker.cluster.stop().await;
    let holds = |text: &str| {
        files(broker.dir.path()).any(|path| {
            let bytes = std::fs::read(path).unwrap_or_default();
            bytes.windows(text.len()).any(|window| window == text.as_bytes())
        })
    };
    assert!(holds("a-name-that-is-easy-to-find"), "the command itself is there");
    assert!(!holds(secret), "its credential is not");
}

fn files(under: &Path) -> Box<dyn Iterator<Item = PathBuf>> {
    let entries = std::fs::read_dir(under).unwrap().map(|entry| entry.unwrap().path());
    Box::new(entries.flat_map(|path| if path.is_dir() { files(&path) } else { Box::new(std::iter::once(path)) }))
}
