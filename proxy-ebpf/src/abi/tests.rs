use core::net::IpAddr;

use super::*;

#[test]
fn addresses_survive_the_way_into_words_and_back() {
    for text in ["10.96.0.1", "0.0.0.0", "127.0.0.1", "fd00::1", "::", "::1"] {
        let ip: IpAddr = text.parse().unwrap();
        assert_eq!(IpAddr::from(Addr::from(ip)), ip);
    }
    let loopback = |text: &str| Addr::from(text.parse::<IpAddr>().unwrap()).is_loopback();
    assert!(loopback("127.9.9.9") && loopback("::1") && !loopback("::2") && !loopback("10.0.0.1"));
    assert_eq!(Addr::from(IpAddr::from([0, 0, 0, 0])), Addr::UNSPECIFIED_V4);
}

#[test]
fn set_words_hold_their_three_parts() {
    let word = SetWord::new(SetWord::MAX_SLOTS - 1, SetWord::MAX_COUNT, 0x2_ffff);
    assert_eq!(
        (word.base(), word.count(), word.generation()),
        (SetWord::MAX_SLOTS - 1, SetWord::MAX_COUNT, 0x2_ffff)
    );
}

#[test]
fn frontend_values_name_their_key() {
    let key = FrontendKey::new(Addr::from_v4_word(7), Be16::new(80), TCP);
    let other = FrontendKey::new(Addr::from_v4_word(7), Be16::new(81), TCP);
    let value = FrontendValue::new(&key, 77, kind::NODE_PORT, frontend_flags::SOURCE_RANGES);
    assert_eq!((value.service(), value.kind(), value.flags()), (77, 2, 1));
    assert!(value.belongs_to(&key) && !value.belongs_to(&other));
}

#[test]
fn reasons_are_listed_by_their_index() {
    for (index, reason) in Reason::ALL.iter().enumerate() {
        assert_eq!(*reason as usize, index);
    }
}
