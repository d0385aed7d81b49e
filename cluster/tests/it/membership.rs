use std::net::TcpListener;
use std::time::Duration;

use selvedge_cluster::LogLimits;
use tempfile::TempDir;

use crate::brokers::{Setup, leader_of, until};

#[tokio::test(flavor = "multi_thread")]
async fn a_learner_catches_up_from_a_snapshot_when_the_log_was_cut() {
    let mut setup = Setup::new();
    setup.log_limits = LogLimits { snapshot_bytes: 10_000, keep_entries: 2 };
    let first = setup.first().await;
    let mut made = 0;
    while first.cluster.status().applied < Some(60) {
        first.create_token(&format!("token-{made}")).await.unwrap();
        made += 1;
    }
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let learner = setup.start(TempDir::new().unwrap()).await;
    learner.cluster.join(std::slice::from_ref(&first.address), &learner.address).await.unwrap();
    until("the learner has the last token", || learner.has_token(&format!("token-{}", made - 1))).await;
    learner.register().await;
    assert_eq!(learner.cluster.state().state_hash(), first.cluster.state().state_hash());
    first.cluster.promote(learner.node).await.unwrap();
    let voters =
        |broker: &crate::brokers::Broker| broker.cluster.status().members.iter().filter(|member| member.voter).count();
    until("both know of two voters", || voters(&first) == 2 && voters(&learner) == 2).await;
    // And it keeps what it installed.
    let learner = learner.restart(&setup).await;
    until("it has the state again", || learner.has_token("token-0")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leadership_is_handed_over_and_a_removed_broker_is_no_member() {
    let brokers = Setup::new().voters(3).await;
    let leader = leader_of(&brokers).await;
    let to = brokers[(leader + 1) % 3].node;
    // Asked of a follower.
    brokers[(leader + 2) % 3].cluster.transfer_leader(Some(to)).await.unwrap();
    until("the other one leads", || brokers[(leader + 1) % 3].cluster.leads()).await;
    brokers[(leader + 1) % 3].cluster.remove(brokers[leader].node).await.unwrap();
    until("two members are left", || brokers[(leader + 1) % 3].cluster.status().members.len() == 2).await;
    brokers[(leader + 1) % 3].create_token("still here").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_of_another_cluster_is_refused() {
    let setup = Setup::new();
    let first = setup.first().await;
    // Same authorities, another cluster id in its calls.
    let other = Setup { authority: setup.authority.clone(), cluster_id: [8; 16], ..Setup::new() };
    let stranger = other.start(TempDir::new().unwrap()).await;
    let error = stranger.cluster.join(std::slice::from_ref(&first.address), &stranger.address).await.unwrap_err();
    assert!(error.to_string().contains("another cluster"), "{error}");
    // Other authorities.
    let foreign = Setup::new().start(TempDir::new().unwrap()).await;
    foreign.cluster.join(std::slice::from_ref(&first.address), &foreign.address).await.unwrap_err();
    assert_eq!(first.cluster.status().members.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_claims_another_node_than_its_certificate_is_refused() {
    let setup = Setup::new();
    let first = setup.first().await;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let liar = setup.start_at(TempDir::new().unwrap(), listener, Some(12_345)).await;
    let error = liar.cluster.join(std::slice::from_ref(&first.address), &liar.address).await.unwrap_err();
    assert!(error.to_string().contains("claims"), "{error}");
    assert_eq!(first.cluster.status().members.len(), 1);
    assert!(liar.cluster.linearizable(Duration::from_millis(300)).await.is_err());
}
