use std::sync::Arc;

use proptest::prelude::*;
use rustls::pki_types::ServerName;

use super::*;

fn rustls_hello(host: &'static str, alpn: Vec<Vec<u8>>) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    config.alpn_protocols = alpn;
    let name = ServerName::try_from(host).unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut bytes = Vec::new();
    while client.wants_write() {
        client.write_tls(&mut bytes).unwrap();
    }
    bytes
}

fn whole(bytes: &[u8]) -> Hello {
    HelloReader::new().push(bytes).unwrap().expect("the hello is whole")
}

/// The same handshake message in records of at most `size` bytes.
fn fragmented(hello: &[u8], size: usize) -> Vec<u8> {
    let records = hello[RECORD_HEADER_BYTES..].chunks(size);
    records.flat_map(|part| [&[RECORD_HANDSHAKE, 3, 1][..], &vector16(part)].concat()).collect()
}

#[test]
fn a_real_hello_is_read_whole_however_it_is_split() {
    let ticket = Ticket::random();
    let hello = rustls_hello("edge.example.com", vec![ALPN_HOP.to_vec(), ticket.alpn()]);
    assert!(hello.len() > 1200, "a hybrid key share makes it `{}` long", hello.len());
    let stream = [&hello[..], b"early bytes"].concat();
    for at in 0..stream.len() {
        let mut reader = HelloReader::new();
        let (first, second) = stream.split_at(at);
        let (read, left) = match reader.push(first).unwrap() {
            Some(read) => (read, second),
            None => (reader.push(second).unwrap().unwrap(), &[][..]),
        };
        assert_eq!([&read.raw[..], left].concat(), stream);
        assert_eq!(read.hello_len, hello.len());
        assert_eq!(read.beyond(), &read.raw[hello.len()..]);
        assert_eq!(read.server_name.as_deref(), Some("edge.example.com"));
        assert_eq!(read.kind(), Kind::Hop { ticket: ticket.clone() });
    }
}

#[test]
fn a_hello_in_one_byte_records_is_read_byte_by_byte() {
    let key = KnockKey::random();
    let hello = ticket_hello("edge.example.com", &Ticket::random());
    let hello = fragmented(&hello, 1);
    let mut reader = HelloReader::new();
    for (at, byte) in hello.iter().enumerate() {
        let read = reader.push(&[*byte]).unwrap();
        assert_eq!(read.is_some(), at + 1 == hello.len());
        if let Some(read) = read {
            assert_eq!(read.raw, hello);
            assert!(matches!(read.kind(), Kind::Hop { .. }));
        }
    }
    let control = rustls_hello("edge.example.com", vec![ALPN_CONTROL.to_vec(), key.knock()]);
    for size in [1, 2, 3, 4, 5, 700, 16_000] {
        let records = fragmented(&control, size);
        assert_eq!(whole(&records).hello_len, records.len());
    }
}

#[test]
fn a_knock_is_admitted_by_its_own_key_only() {
    let key = KnockKey::random();
    let hello = whole(&rustls_hello("a.example", vec![ALPN_CONTROL.to_vec(), key.knock()]));
    let Kind::Control { knock } = hello.kind() else { panic!("not a control stream: {hello:?}") };
    assert!(key.admits(&knock));
    assert!(KnockKey::from_bytes(key.as_bytes()).unwrap().admits(&knock));
    assert!(!KnockKey::random().admits(&knock));
    let mut entry = key.knock();
    entry[5] ^= 1;
    assert!(!key.admits(&Knock::from_alpn(&entry).unwrap()));
    assert_eq!(Knock::from_alpn(&entry[..entry.len() - 1]), None);
}

#[test]
fn what_shows_no_single_proof_is_neither_control_nor_hop() {
    let (key, ticket) = (KnockKey::random(), Ticket::random());
    let other = [
        vec![],
        vec![b"h2".to_vec()],
        vec![ALPN_CONTROL.to_vec()],
        vec![ALPN_HOP.to_vec()],
        vec![ticket.alpn()],
        vec![ALPN_HOP.to_vec(), key.knock()],
        vec![ALPN_CONTROL.to_vec(), ticket.alpn()],
        vec![ALPN_HOP.to_vec(), ALPN_CONTROL.to_vec(), ticket.alpn(), key.knock()],
        vec![ALPN_HOP.to_vec(), ticket.alpn(), Ticket::random().alpn()],
        vec![ALPN_HOP.to_vec(), ticket.alpn()[..33].to_vec()],
    ];
    for alpn in other {
        assert_eq!(whole(&rustls_hello("a.example", alpn)).kind(), Kind::Other);
    }
}

#[test]
fn a_ticket_hello_is_accepted_by_a_real_tls_server_as_a_client_hello() {
    let ticket = Ticket::random();
    let bytes = ticket_hello("edge.example.com", &ticket);
    let mut acceptor = rustls::server::Acceptor::default();
    acceptor.read_tls(&mut &bytes[..]).unwrap();
    let accepted = acceptor.accept().unwrap().expect("the hello is whole");
    let hello = accepted.client_hello();
    assert_eq!(hello.server_name(), Some("edge.example.com"));
    let alpn: Vec<_> = hello.alpn().unwrap().collect();
    assert_eq!(alpn, [ALPN_HOP, &ticket.alpn()]);

    let read = whole(&bytes);
    assert_eq!(read.kind(), Kind::Hop { ticket: ticket.clone() });
    assert!(read.beyond().is_empty());
    assert_eq!(whole(&ticket_hello("127.0.0.1", &ticket)).server_name, None);
}

#[test]
fn what_is_no_client_hello_is_refused_at_once() {
    let push = |bytes: &[u8]| HelloReader::new().push(bytes).expect_err("it is refused");
    assert!(matches!(push(b"G"), Error::NotTls));
    assert!(matches!(push(&[22, 2]), Error::NotTls));
    assert!(matches!(push(&[22, 3, 1, 0, 0]), Error::EmptyRecord));
    assert!(matches!(push(&[22, 3, 1, 0x40, 1]), Error::TooLong));
    assert!(matches!(push(&[22, 3, 1, 0, 9, 2]), Error::NotClientHello(2)));
    assert!(matches!(push(&[22, 3, 1, 0, 4, 1, 1, 0, 0]), Error::TooLong));
    assert!(matches!(push(&[22, 3, 1, 0, 4, 1, 0, 0, 0]), Error::Malformed(_)));
    let many = fragmented(&[&[0; 5][..], &[1, 0, 0x3f, 0], &[0; 0x3f00][..]].concat(), 1);
    assert!(matches!(push(&many), Error::TooLong));
    let mut reader = HelloReader::new();
    assert!(reader.push(b"G").is_err());
    assert!(reader.push(&ticket_hello("a.example", &Ticket::random())).is_err());
}

#[test]
fn secrets_do_not_print() {
    let hello = whole(&ticket_hello("a.example", &Ticket::random()));
    assert_eq!(format!("{hello:?}"), "Hello { server_name: Some(\"a.example\"), kind: Hop { ticket: *** }, .. }");
    assert_eq!(format!("{:?}", KnockKey::random()), "***");
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..600), 0..40)) {
        let mut reader = HelloReader::new();
        for piece in pieces {
            if reader.push(&piece).is_err() {
                break;
            }
            prop_assert!(reader.raw.len() < HELLO_BYTES_MAX && reader.message.len() < HELLO_BYTES_MAX);
        }
    }

    #[test]
    fn a_changed_hello_never_panics_and_loses_nothing(
        at in 0usize..2000, value: u8, cut in 0usize..2000, size in 1usize..2000
    ) {
        let mut bytes = ticket_hello("edge.example.com", &Ticket::random());
        let len = bytes.len();
        bytes[at % len] = value;
        let bytes = fragmented(&bytes, size);
        let cut = cut % bytes.len();
        let mut reader = HelloReader::new();
        match reader.push(&bytes[..cut]) {
            Ok(None) => if let Ok(Some(hello)) = reader.push(&bytes[cut..]) {
                prop_assert_eq!(hello.raw, bytes);
            },
            Ok(Some(hello)) => prop_assert_eq!(&hello.raw[..], &bytes[..cut]),
            Err(_) => {}
        }
    }
}
