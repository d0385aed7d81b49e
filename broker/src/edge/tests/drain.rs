//! Leaving in order.

use std::time::Duration;

use selvedge_proto::frame::SessionCode;

use super::world::*;
use crate::audit::Record;

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_outlives_a_drain_is_cut_and_its_end_recorded() {
    let world = world().await;
    let _dialed = with_connector(&world, Manner::echoes()).await;
    let mut client = world.attach(&world.client, 1).await;
    let mut hop = open_echo(&world, &mut client).await;
    assert_eq!(world.edge.drain(Duration::ZERO).await, 1);
    assert!(drain(&mut hop).await.is_empty());
    let is_end =
        |record: &Record| matches!(record, Record::SessionClose(c) if c.why == SessionCode::BrokerDraining.as_str());
    wait_for(|| world.records().iter().any(is_end)).await;
}
