//! Kills, partitions and changes of the membership, all while clients write.

use std::time::Duration;

use selvedge_storage::engine::mem::Moment;

use crate::brokers::{PATIENCE, Setup, until};
use crate::crash::{self, Host, Writer, check};
use crate::links::Links;
use crate::process::{Process, Processes};

/// Times that processes are killed.
const ROUNDS: u64 = 3;
const ROUNDS_LONG: u64 = 30;

fn rounds() -> u64 {
    if std::env::var_os("SELVEDGE_LONG").is_some() { ROUNDS_LONG } else { ROUNDS }
}

/// A number below `end`, another in each round.
fn below(round: u64, end: u64) -> u64 {
    let seed = u64::from(std::process::id()) ^ (round + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((seed ^ (seed >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 33) % end.max(1)
}

// F01: SIGKILL of the leader's process, which starts again a while later.
#[test]
fn a_leader_that_is_killed_is_followed_by_another_and_nothing_acknowledged_is_lost() {
    let mut cluster = Processes::new();
    let mut brokers = cluster.voters(3);
    for round in 0..rounds() {
        let leader = cluster.leader(&brokers);
        let killed = brokers.remove(leader);
        let place = killed.place;
        killed.kill();
        // Both that are left write through another leader.
        cluster.work(&mut brokers, 3);
        std::thread::sleep(Duration::from_millis(below(round, 3_000)));
        let mut back = cluster.start(place, &Processes::this_build());
        back.ready();
        brokers.insert(leader, back);
        cluster.work(&mut brokers, 3);
    }
    cluster.check(brokers);
}

// F02: SIGKILL of all processes at once, which start again in another order each time.
#[test]
fn brokers_that_are_all_killed_at_once_come_back_in_any_order_with_everything_acknowledged() {
    let mut cluster = Processes::new();
    let mut brokers = cluster.voters(3);
    for round in 0..rounds() {
        cluster.work(&mut brokers, 3);
        std::thread::sleep(Duration::from_millis(below(round, 200)));
        let mut places: Vec<usize> = brokers.iter().map(|broker| broker.place).collect();
        brokers.into_iter().for_each(Process::kill);
        places.rotate_left(below(round, 3) as usize);
        if round % 2 == 1 {
            places.swap(0, 1);
        }
        brokers = places.into_iter().map(|place| cluster.start(place, &Processes::this_build())).collect();
        brokers.iter_mut().for_each(Process::ready);
    }
    cluster.work(&mut brokers, 3);
    cluster.check(brokers);
}

// F09: the leader is in the smaller part of three, and of five.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "long, and fails now and then on a busy machine"]
async fn a_leader_on_the_smaller_side_of_a_partition_answers_nothing_and_forwards_nothing_beyond_its_lease() {
    for count in [3, 5] {
        let mut setup = Setup::new();
        let links = Links::default();
        setup.links = Some(links.clone());
        let hosts = crash::voters(&setup, &links, count).await;
        let writer = Writer::default();
        let writers = writer.start(&hosts, 4);
        until("all hold a lease", || hosts.iter().all(|host| host.broker.cluster.lease().open())).await;
        let leader = crash::leader_of(&hosts).await;
        let small: Vec<&Host> = (0..count / 2).map(|at| &hosts[(leader + at) % count]).collect();
        let large: Vec<&Host> = (count / 2..count).map(|at| &hosts[(leader + at) % count]).collect();
        let side: Vec<_> = small.iter().map(|host| (setup.place(host.broker.node), host.broker.node)).collect();
        let term = small[0].broker.cluster.status().term;
        small.iter().for_each(|host| writer.remove(host.broker.node));
        links.part(&side, true);

        // The larger side elects and writes; the smaller one hears nothing of it.
        until("another leads", || large.iter().any(|host| host.broker.cluster.leads())).await;
        large[0].broker.create_token("during").await.unwrap();
        let revoked = large[0].broker.cluster.state().position();
        assert!(large[0].broker.cluster.status().term > term);
        for host in &small {
            assert!(!host.broker.has_token("during"), "it is parted from the others");
            let read = host.broker.cluster.linearizable(Duration::from_millis(300)).await;
            assert!(read.is_err(), "what it holds may be old");
        }
        // What was changed counts as enforced only when those who cannot have heard of it forward nothing any more.
        let enforced = large[0].broker.cluster.enforced(revoked, PATIENCE).await.unwrap();
        assert!(enforced.complete, "{enforced:?}");
        for host in &small {
            assert!(!host.broker.cluster.lease().open(), "it holds a lease after the change counts as enforced");
        }
        let written = writer.acknowledged();
        until("writes go on", || writer.acknowledged() > written + 20).await;

        links.part(&side, false);
        for host in &small {
            until("it follows again", || host.broker.has_token("during")).await;
            writer.add(&host.broker);
        }
        let written = writer.acknowledged();
        until("writes go on", || writer.acknowledged() > written + 20).await;
        writer.stop(writers).await;
        check(&hosts, &writer).await;
        until("all hold a lease again", || hosts.iter().all(|host| host.broker.cluster.lease().open())).await;
    }
}

fn voters(host: &Host) -> usize {
    let status = host.broker.cluster.status();
    if status.joint { 0 } else { status.members.iter().filter(|member| member.voter).count() }
}

async fn all_know(hosts: &[Host], count: usize) {
    until("all know who votes", || hosts.iter().all(|host| voters(host) == count)).await;
}

// F19: add, promote, remove, remove the leader, replace a dead one, while leaders lose power half-way (F01) and are cut off
// (F09).
#[tokio::test(flavor = "multi_thread")]
#[ignore = "long, and fails now and then on a busy machine"]
async fn the_membership_changes_while_leaders_die_and_are_cut_off_and_nothing_acknowledged_is_lost() {
    let mut setup = Setup::new();
    let links = Links::default();
    setup.links = Some(links.clone());
    let mut hosts = crash::voters(&setup, &links, 3).await;
    let writer = Writer::default();
    let writers = writer.start(&hosts, 2);

    // A fourth: the leader's power is lost as it applies the first half of the change.
    let fourth = Host::new(&setup, &links, &hosts).await;
    crash::join(&hosts[0].broker, &fourth.broker).await;
    hosts.push(fourth);
    let leader = crash::leader_of(&hosts).await;
    let asked = &hosts[(leader + 1) % 3].broker;
    let (asked, owner) = (asked.cluster.clone(), asked.owner());
    let node = hosts[3].broker.node;
    hosts[leader].state.set_trap(Moment::Before, &hosts[leader].log, crash::is_membership);
    let promoting = tokio::spawn(async move { asked.promote(&owner, node).await });
    let victim = &hosts[leader];
    until("the leader is without power", || !victim.state.has_trap()).await;
    writer.remove(victim.broker.node);
    promoting.await.unwrap().unwrap();
    let host = hosts.remove(leader).restart(&setup).await;
    writer.add(&host.broker);
    hosts.insert(leader, host);
    all_know(&hosts, 4).await;

    // A fifth: the leader is cut off meanwhile.
    let fifth = Host::new(&setup, &links, &hosts).await;
    crash::join(&hosts[0].broker, &fifth.broker).await;
    hosts.push(fifth);
    let leader = crash::leader_of(&hosts).await;
    let side = [(setup.place(hosts[leader].broker.node), hosts[leader].broker.node)];
    writer.remove(hosts[leader].broker.node);
    links.part(&side, true);
    let asked = &hosts[(leader + 1) % 4].broker;
    asked.cluster.promote(&asked.owner(), hosts[4].broker.node).await.unwrap();
    assert_ne!(voters(&hosts[leader]), 5, "it is cut off");
    links.part(&side, false);
    writer.add(&hosts[leader].broker);
    all_know(&hosts, 5).await;

    // The leader itself goes for ever.
    let leader = crash::leader_of(&hosts).await;
    let gone = hosts.remove(leader);
    writer.remove(gone.broker.node);
    hosts[0].broker.remove(gone.broker.node).await;
    let ended = tokio::time::timeout(PATIENCE, gone.broker.cluster.fatal()).await.expect("it is told, and ends");
    assert_eq!(ended.code(), "SE0104");
    all_know(&hosts, 4).await;

    // One dies and does not come back: a new one takes its place.
    let dead = hosts.pop().expect("four are left");
    writer.remove(dead.broker.node);
    dead.broker.cluster.stop().await;
    let new = Host::new(&setup, &links, &hosts).await;
    crash::join(&hosts[0].broker, &new.broker).await;
    hosts[0].broker.cluster.promote(&hosts[0].broker.owner(), new.broker.node).await.unwrap();
    hosts[0].broker.remove(dead.broker.node).await;
    hosts.push(new);
    all_know(&hosts, 4).await;

    // And back to three.
    let last = hosts.remove(0);
    writer.remove(last.broker.node);
    if last.broker.cluster.leads() {
        last.broker.cluster.hand_over(None).await.unwrap();
    }
    let node = last.broker.node;
    until("another leads", || hosts[0].broker.cluster.status().leader.is_some_and(|leader| leader != node)).await;
    hosts[0].broker.remove(node).await;
    all_know(&hosts, 3).await;

    let written = writer.acknowledged();
    until("writes go on", || writer.acknowledged() > written + 20).await;
    writer.stop(writers).await;
    check(&hosts, &writer).await;
}
