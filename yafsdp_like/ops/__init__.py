"""Operations that models and the sharded runtime share: they know neither models nor units."""
