//! Nothing that was acknowledged is lost.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::world::World;

/// How long writes run before everything is killed.
const LOAD: Duration = Duration::from_secs(3);

#[test]
fn all_brokers_killed_under_load_come_back_with_every_acknowledged_write() {
    let mut world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 3);
    let token = world.directory("people");
    let stop = Arc::new(AtomicBool::new(false));
    let acknowledged = Arc::new(Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for writer in 0..6 {
            let (world, token, stop, acknowledged) = (&world, &token, stop.clone(), acknowledged.clone());
            scope.spawn(move || {
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let name = format!("w{writer}-{number}@test.example");
                    let body = json!({"schemas": ["urn:ietf:params:scim:schemas:core:2.0:User"], "userName": name});
                    let (status, user) = world.http(writer % 3, "POST", "/scim/v2/Users", token, Some(body));
                    if status == 201 {
                        let id = user["id"].as_str().expect("an id").to_owned();
                        acknowledged.lock().expect("not poisoned").push((name, id));
                    }
                }
            });
        }
        std::thread::sleep(LOAD);
        for number in 0..3 {
            // By id, while the writers still write.
            kill(world.broker_pid(number));
        }
        stop.store(true, Ordering::Relaxed);
    });
    for number in 0..3 {
        world.kill_broker(number);
    }
    for number in [2, 0, 1] {
        world.spawn_broker(number);
    }
    for number in 0..3 {
        world.wait_ready(number);
    }
    let acknowledged = acknowledged.lock().expect("not poisoned");
    assert!(acknowledged.len() > 50, "only {} writes were acknowledged before the kill", acknowledged.len());
    for (at, (name, id)) in acknowledged.iter().enumerate() {
        let (status, user) = world.http(at % 3, "GET", &format!("/scim/v2/Users/{id}"), &token, None);
        assert_eq!((status, user["userName"].as_str()), (200, Some(name.as_str())));
    }
}

#[test]
fn a_write_through_any_broker_works_while_the_leader_is_away() {
    let mut world = World::start(Path::new(env!("CARGO_BIN_EXE_selvedge")), 3);
    let token = world.directory("people");
    let leader = world.leader();
    world.kill_broker(leader);
    let begun = Instant::now();
    for number in (0..3).filter(|number| *number != leader) {
        let name = format!("through-{number}@test.example");
        crate::world::wait("a write without the old leader", || {
            let body = json!({"schemas": ["urn:ietf:params:scim:schemas:core:2.0:User"], "userName": name});
            let (status, _) = world.http(number, "POST", "/scim/v2/Users", &token, Some(body));
            status == 201 || status == 409
        });
    }
    assert!(begun.elapsed() < crate::world::DEADLINE);
    world.start_broker(leader);
    let (status, list) = world.http(leader, "GET", "/scim/v2/Users", &token, None);
    assert_eq!((status, list["totalResults"].as_u64()), (200, Some(2)));
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).expect("a process id")).expect("not 0");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("the broker runs");
}
