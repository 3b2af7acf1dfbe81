# The crash campaign: the listener killed, its calls failing, the line cut, the power
# gone, at some hundred places of all stores; and whether a fault would be noticed.
# shellcheck disable=SC2154 # lib.bash has variables
load lib

campaign() { /usr/bin/python3 "$top/tests/tools/campaign" "$@"; }

@test "wherever it breaks, nothing is lost, nothing stored twice, nothing wrongly reported" {
	case $BSMTP in
	*torture*) campaign --program "$BSMTP" --places 40 ;;   # some forty times slower
	*asan*) campaign --program "$BSMTP" --places 200 ;;
	*) campaign --program "$BSMTP" --small ;;
	esac
}

# This tries out the campaign itself, with the plain program, for a sanitized one cannot
# have the faults: each build's run of the suite has its share.
@test "a sync that is left out is noticed: of the mail, of what stands beside it, of folders" {
	local what
	case $BSMTP in *asan*) what=store ;; *torture*) what=side ;; *) what=names ;; esac
	campaign --program "$top/bsmtp" --plant $what --places 50
}
